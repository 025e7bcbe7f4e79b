"""Pretrained towers from a directory in Hugging Face layout: `config.json` and safetensors, no torch.

`load(directory, kind)` gives the Linen module that the configuration describes and its parameters. Every tensor of the
file is accounted for; `huggingface.py` says which becomes which parameter.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import flax
import flax.linen as nn
import jax
import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open

from mefn_jax.encoders.pretrained.huggingface import ARCHITECTURES, BUILT
from mefn_jax.encoders.transformer import ACTIVATIONS
from mefn_jax.errors import WeightsError

# Buffers and heads for other tasks, which a retrieval model has no use for.
IGNORED = ("position_ids", "num_batches_tracked", "mask_token")
HEADS = ("cls.", "classifier.", "qa_outputs.")
TRAINING_OPTIONS = (
    "dropout",
    "stochastic_depth",
    "dtype",
    "remat",
)  # a module's options that a checkpoint does not decide
MAX_LISTED = 60  # problems named at once
FETCHED_FILES = ("*.json", "*.safetensors", "vocab.txt", "merges.txt")  # what is fetched of a checkpoint


@dataclasses.dataclass(frozen=True)
class Tower:
    """A Linen module `(inputs, ..., deterministic) -> (fragments' states, pooled)` and its parameters, a nested dict of
    float32 arrays; of a CLIP the projection of `pooled` into the joint space `(C, D)` and the logarithm of the scale,
    None otherwise."""

    module: nn.Module
    params: dict
    projection: np.ndarray | None
    logit_scale: float | None


def load_tower(directory, kind: str) -> Tower:
    """The "image" or "text" tower in a directory. Raises WeightsError if there is none that we can build, naming what
    is wrong: the architecture, the option, or each missing, surplus or misshapen tensor."""
    directory = Path(directory)
    config = read_config(directory)
    known = {(k, name): build for k, name, build in ARCHITECTURES}
    name = config.get("model_type")
    if (kind, name) not in known:
        there = ", ".join(n for k, n in known if k == kind)
        raise WeightsError(f"{directory}: model_type {name!r} is no {kind} tower that can be loaded; there are {there}")
    values = config.get({"image": "vision_config", "text": "text_config"}[kind], config)
    _check_options(directory, name, values)
    # BERT's oldest files have these names.
    old = {"gamma": "weight", "beta": "bias"}
    tensors = {
        re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: old[m[0]], n): t for n, t in read_tensors(directory).items()
    }
    try:
        module, table, inputs, other = known[kind, name](values, tensors)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    except (ValueError, TypeError, ZeroDivisionError) as e:
        raise WeightsError(f"{directory}/config.json: {_first_line(e)}") from None
    projection = (config.get("projection_dim"), values.get("hidden_size"))
    return Tower(module, *_match_tensors(directory, tensors, table, shapes, other, projection))


def _check_options(directory: Path, name: str, values: dict) -> None:
    # Of a ResNet, Hugging Face uses the option in some blocks and ReLU in others: nothing to be equal to.
    activations = ("relu",) if name == "resnet" else tuple(ACTIVATIONS)
    if values["hidden_act"] not in activations:
        raise WeightsError(
            f"{directory}/config.json: hidden_act {values['hidden_act']!r} is not one of {', '.join(activations)}"
        )
    for option, value in BUILT.items():
        if values.get(option, value) != value:
            raise WeightsError(f"{directory}/config.json: {option} {values[option]!r} is not built, only {value!r}")


def options(module: nn.Module) -> dict:
    """The sizes that a tower's module was made with, by name; not how it is trained (TRAINING)."""
    skipped = ("parent", "name", *TRAINING_OPTIONS)
    return {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name not in skipped}


def locate_checkpoint(name: str) -> Path:
    """The directory of a checkpoint: `name` itself, or the local copy of what the Hugging Face hub has by this name,
    fetched where there is a network. Raises WeightsError where there is neither."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise WeightsError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        return Path(snapshot_download(name, allow_patterns=list(FETCHED_FILES)))
    except (OSError, ValueError) as e:
        raise WeightsError(
            f"{name}: no such directory here, nor to be had from the Hugging Face hub ({type(e).__name__}). Where "
            f"there is a network, run: hf download {name} --local-dir DIR; copy DIR to this machine and give its path"
        ) from None


def read_tokenizer(directory: Path) -> str:
    """The checkpoint's tokenizer as the text of a `tokenizer.json`, made from `vocab.txt` or `vocab.json` where it
    comes so. Raises WeightsError without any."""
    path = directory / "tokenizer.json"
    if not path.is_file() and not any((directory / name).is_file() for name in ("vocab.txt", "vocab.json")):
        raise WeightsError(f"{path}: no such file, nor vocab.txt or vocab.json; copy them from the checkpoint's source")
    try:
        if path.is_file():
            return tokenizers.Tokenizer.from_file(str(path)).to_str()
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer  # slow to import

        return AutoTokenizer.from_pretrained(directory).backend_tokenizer.to_str()
    except Exception as e:  # of many kinds
        raise WeightsError(f"{directory}: no tokenizer can be made of its files ({_first_line(e)})") from None


def read_config(directory: Path) -> dict:
    """The checkpoint's `config.json`, with the defaults of `transformers` for what it leaves out. Raises WeightsError
    if there is none, or it makes no sense."""
    path = directory / "config.json"
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such file; give the directory of a Hugging Face checkpoint (config.json, model.safetensors)"
        )
    config = read_object(path)
    if config.get("model_type") not in {name for _, name, _ in ARCHITECTURES}:
        return config  # `load` refuses it
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoConfig  # slow to import

    try:
        return AutoConfig.for_model(**config).to_dict()
    except Exception as e:  # of many kinds
        raise WeightsError(f"{path}: {_first_line(e)}") from None


def read_object(path: Path) -> dict:
    """A JSON file that holds an object. Raises WeightsError if it does not."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise WeightsError(f"{path}: is not JSON ({e})") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of `model.safetensors`, or of the files that `model.safetensors.index.json` lists, as float32."""
    tensors = {}
    for path in _files(directory):
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    tensors[name] = _float32(file, name)
        except (SafetensorError, OSError) as e:
            raise WeightsError(f"{path}: cannot be read ({e}); it may be cut short: copy it again") from None
    return tensors


def _float32(file, name: str) -> np.ndarray:
    value = file.get_tensor(name)
    return value.astype(np.float32) if value.dtype.kind == "f" or value.dtype.name == "bfloat16" else value


def _files(directory: Path) -> list[Path]:
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        listed = read_object(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise WeightsError(f"{index}: has no weight_map; copy it again")
        names = sorted({str(name) for name in listed.values()})
        missing = [n for n in names if not (directory / n).is_file()]
        if missing:
            raise WeightsError(f"{directory}: lacks {', '.join(missing)}, which {index.name} lists; copy them too")
        return [directory / n for n in names]
    if single.is_file():
        return [single]
    pickles = sorted(directory.glob("pytorch_model*.bin")) or sorted(directory.glob("*.bin"))
    if not pickles:
        raise WeightsError(
            f"{single}: no such file; copy it from the checkpoint's source. If that has only pytorch_model.bin, copy "
            "it here and run the command again to see how to convert it"
        )
    raise WeightsError(
        f"{pickles[0]}: a pickle may run code when it is read and is refused; convert it where torch is: python -c "
        '"import torch, safetensors.torch as s; s.save_file({k: v.contiguous().clone() for f in '
        f"{[str(p) for p in pickles]} for k, v in torch.load(f, weights_only=True).items()}}, '{single}')\""
    )


def _match_tensors(directory, tensors: dict, table: list, shapes: dict, other: Callable, projection: tuple) -> tuple:
    """Parameters from tensors by the table, the projection `(C, D)` whose tensor must have the shape `projection`, and
    the logit scale; the last two None where there is none. `other(name)` is true of the other tower's tensors."""
    wanted, problems, rest = {}, set(), dict(tensors)
    for name, path, turn in table:
        leaf = shapes
        for part in path:
            leaf = leaf[part]
        shape = turn.source_shape(leaf.shape)
        tensor = rest.pop(name, tensors.get(name))
        if tensor is None:
            problems.add(f"missing {name}{f' {shape}' if shape else ''}")
        elif tensor.dtype != np.float32:
            problems.add(f"{name} has dtype {tensor.dtype}; only float32, float16 and bfloat16 are read")
        elif shape and tensor.shape != shape:
            problems.add(f"{name} has shape {tensor.shape}, expected {shape}")
        else:
            wanted[path] = (tensor, leaf.shape, turn.convert)
    found = {"projection": None, "logit_scale": None}
    for name, tensor in rest.items():
        if name == "logit_scale":
            found["logit_scale"] = float(tensor)
        elif name.endswith("_projection.weight") and not other(name):
            if tensor.shape != projection:
                problems.add(f"{name} has shape {tensor.shape}, expected {projection}")
            found["projection"] = tensor.T
        elif not (name.endswith(IGNORED) or name.startswith(HEADS) or other(name)):
            problems.add(f"surplus {name} {tensor.shape}")
    if problems:
        more = f" and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise WeightsError(
            f"{directory}: weights do not fit config.json: {'; '.join(sorted(problems)[:MAX_LISTED])}{more}"
        )
    params = {path: np.ascontiguousarray(turn(x, shape)) for path, (x, shape, turn) in wanted.items()}
    return flax.traverse_util.unflatten_dict(params), found["projection"], found["logit_scale"]
