"""Loading of pretrained towers from a directory in Hugging Face layout: `config.json` and safetensors, without torch.

`load_tower(directory, kind)` returns the Linen module that `config.json` describes, with its parameters. Every tensor
of the file is accounted for. `huggingface.py` maps tensors to parameters.
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

# Ends of the names of buffers, and starts of the names of heads for other tasks. A retrieval model needs neither.
IGNORED = ("position_ids", "num_batches_tracked", "mask_token")
HEADS = ("cls.", "classifier.", "qa_outputs.")
# Options of a module that a checkpoint does not determine.
TRAINING_OPTIONS = ("dropout", "stochastic_depth", "dtype", "remat")
MAX_LISTED = 60  # largest number of problems that one error names
FETCHED_FILES = ("*.json", "*.safetensors", "vocab.txt", "merges.txt")  # files of a checkpoint to download


@dataclasses.dataclass(frozen=True)
class Tower:
    """Pretrained tower.

    Attributes:
        module: a Linen module `(inputs, ..., deterministic) -> (states of the fragments, pooled)`.
        params, constants: its parameters, and its stored statistics, nested dicts of float32 arrays.
        projection: CLIP's projection of `pooled` into the joint space, float32 `(C, D)`; None for other towers.
        logit_scale: CLIP's logit scale, as a logarithm; None for other towers.
    """

    module: nn.Module
    params: dict
    constants: dict
    projection: np.ndarray | None
    logit_scale: float | None


def load_tower(directory, kind: str) -> Tower:
    """Loads the tower of `kind` "image" or "text" from a directory.

    Raises WeightsError if it is missing or not supported. The error names the architecture, the option, or each tensor
    that is missing, surplus or of the wrong shape.
    """
    directory = Path(directory)
    config = read_config(directory)
    builders = {(k, name): build for k, name, build in ARCHITECTURES}
    name = config.get("model_type")
    if (kind, name) not in builders:
        supported = ", ".join(n for k, n in builders if k == kind)
        raise WeightsError(
            f"{directory}: model_type {name!r} is no {kind} tower that can be loaded; supported are {supported}"
        )
    values = config.get({"image": "vision_config", "text": "text_config"}[kind], config)
    _check_options(directory, name, values)
    # The oldest checkpoints of BERT use these names of a LayerNorm's parameters.
    new_names = {"gamma": "weight", "beta": "bias"}
    tensors = {
        re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: new_names[m[0]], n): t
        for n, t in read_tensors(directory).items()
    }
    try:
        module, table, inputs, is_other_tower = builders[kind, name](values, tensors)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    except (ValueError, TypeError, ZeroDivisionError) as e:
        raise WeightsError(f"{directory}/config.json: {_to_one_line(e)}") from None
    projection_shape = (config.get("projection_dim"), values.get("hidden_size"))
    return Tower(module, *_match_tensors(directory, tensors, table, shapes, is_other_tower, projection_shape))


def _check_options(directory: Path, name: str, values: dict) -> None:
    """Raises WeightsError if config.json asks for an activation or another option that is not supported."""
    # In a ResNet, Hugging Face applies the option in some blocks and ReLU in others, so that only ReLU can be matched.
    activations = ("relu",) if name == "resnet" else tuple(ACTIVATIONS)
    if values["hidden_act"] not in activations:
        raise WeightsError(
            f"{directory}/config.json: hidden_act {values['hidden_act']!r} is not one of {', '.join(activations)}"
        )
    for option, value in BUILT.items():
        if values.get(option, value) != value:
            raise WeightsError(f"{directory}/config.json: {option} {values[option]!r} is not supported, only {value!r}")


def module_options(module: nn.Module) -> dict:
    """Returns the fields of a tower's module by name, without those of `TRAINING_OPTIONS`."""
    left_out = ("parent", "name", *TRAINING_OPTIONS)
    return {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name not in left_out}


def locate_checkpoint(name: str) -> Path:
    """Returns the directory of a checkpoint: `name` itself if it is a directory, else the local copy of the Hugging
    Face hub's checkpoint of this name, which is downloaded if necessary. Raises WeightsError if neither is
    available."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise WeightsError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        return Path(snapshot_download(name, allow_patterns=list(FETCHED_FILES)))
    except (OSError, ValueError) as e:
        raise WeightsError(
            f"{name}: no such directory, and not available from the Hugging Face hub ({type(e).__name__}). Where there "
            f"is a network, run: hf download {name} --local-dir DIR; copy DIR to this machine and give its path"
        ) from None


def read_tokenizer(directory: Path) -> str:
    """Returns the checkpoint's tokenizer as the text of a `tokenizer.json`. If this file is missing, the text is made
    from `vocab.txt` or `vocab.json`. Raises WeightsError if none of the three can be used."""
    path = directory / "tokenizer.json"
    if not path.is_file() and not any((directory / name).is_file() for name in ("vocab.txt", "vocab.json")):
        raise WeightsError(f"{path}: no such file, nor vocab.txt or vocab.json; copy them from the checkpoint's source")
    try:
        if path.is_file():
            return tokenizers.Tokenizer.from_file(str(path)).to_str()
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer  # slow to import

        return AutoTokenizer.from_pretrained(directory).backend_tokenizer.to_str()
    except Exception as e:  # the libraries raise errors of many classes
        raise WeightsError(
            f"{directory}: its tokenizer cannot be read ({_to_one_line(e)}); copy its files again from their source"
        ) from None


def read_config(directory: Path) -> dict:
    """Returns the object of the checkpoint's `config.json`, completed by the defaults of `transformers`. Raises
    WeightsError if the file is missing or cannot be interpreted."""
    path = directory / "config.json"
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such file; give the directory of a Hugging Face checkpoint (config.json, model.safetensors)"
        )
    config = read_object(path)
    if config.get("model_type") not in {name for _, name, _ in ARCHITECTURES}:
        return config  # `load_tower` rejects it
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoConfig  # slow to import

    try:
        return AutoConfig.for_model(**config).to_dict()
    except Exception as e:  # the library raises errors of many classes
        raise WeightsError(f"{path}: {_to_one_line(e)}") from None


def read_object(path: Path) -> dict:
    """Returns the object that a JSON file holds. Raises WeightsError if it is not JSON, or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise WeightsError(f"{path}: is not JSON ({e})") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def _to_one_line(error: Exception) -> str:
    """Returns the message of an error on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300]


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Returns all tensors of `model.safetensors`, or of the files that `model.safetensors.index.json` lists, by name.

    Floating-point tensors become float32, others stay as they are. Raises WeightsError for a file that is missing,
    damaged or a pickle.
    """
    tensors = {}
    for path in _list_files(directory):
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    tensors[name] = _read_float32(file, name)
        except (SafetensorError, OSError) as e:
            raise WeightsError(f"{path}: cannot be read ({e}); it may be incomplete, copy it again") from None
    return tensors


def _read_float32(file, name: str) -> np.ndarray:
    """Reads a tensor; floating-point numbers become float32."""
    value = file.get_tensor(name)
    return value.astype(np.float32) if value.dtype.kind == "f" or value.dtype.name == "bfloat16" else value


def _list_files(directory: Path) -> list[Path]:
    """Returns the files that hold the tensors. Raises WeightsError if some are missing, or there are only pickles."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        listed = read_object(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise WeightsError(f"{index}: has no weight_map; copy it again")
        names = sorted({str(name) for name in listed.values()})
        missing = [n for n in names if not (directory / n).is_file()]
        if missing:
            raise WeightsError(
                f"{directory}: {index.name} lists {', '.join(missing)}, which are missing; copy them too"
            )
        return [directory / n for n in names]
    if single.is_file():
        return [single]
    pickles = sorted(directory.glob("pytorch_model*.bin")) or sorted(directory.glob("*.bin"))
    if not pickles:
        raise WeightsError(
            f"{single}: no such file; copy it from the checkpoint's source. If the source has only pytorch_model.bin, "
            "copy that and run the command again to see how to convert it"
        )
    raise WeightsError(
        f"{pickles[0]}: a pickle may run code when it is read and is refused; convert it where torch is installed: "
        "python -c "
        '"import torch, safetensors.torch as s; s.save_file({k: v.contiguous().clone() for f in '
        f"{[str(p) for p in pickles]} for k, v in torch.load(f, weights_only=True).items()}}, '{single}')\""
    )


def _match_tensors(
    directory, tensors: dict, table: list, shapes: dict, is_other_tower: Callable, projection_shape: tuple
) -> tuple:
    """Converts tensors to parameters and constants by the rows of `table`.

    `shapes` are those of the module's variables, `projection_shape` is that of the projection's tensor, and
    `is_other_tower(name)` is True for tensors of the other tower. Returns the nested dicts of parameters and of
    constants, the projection `(C, D)` and the logit scale, the last two None if the file has none. Raises WeightsError
    that names all tensors that are missing, surplus or of the wrong shape or type.
    """
    flat_shapes = {kind: flax.traverse_util.flatten_dict(tree) for kind, tree in shapes.items()}
    leaves = {path: leaf for flat in flat_shapes.values() for path, leaf in flat.items()}
    sources, problems, rest = {}, set(), dict(tensors)
    for name, path, conversion in table:
        leaf = leaves[path]
        shape = conversion.source_shape(leaf.shape)
        tensor = rest.pop(name, tensors.get(name))
        if tensor is None:
            problems.add(f"missing {name}{f' {shape}' if shape else ''}")
        elif tensor.dtype != np.float32:
            problems.add(f"{name} has dtype {tensor.dtype}; only float32, float16 and bfloat16 are read")
        elif shape and tensor.shape != shape:
            problems.add(f"{name} has shape {tensor.shape}, expected {shape}")
        else:
            sources[path] = (tensor, leaf.shape, conversion.convert)
    clip_head = {"projection": None, "logit_scale": None}
    for name, tensor in rest.items():
        if name == "logit_scale":
            clip_head["logit_scale"] = float(tensor)
        elif name.endswith("_projection.weight") and not is_other_tower(name):
            if tensor.shape != projection_shape:
                problems.add(f"{name} has shape {tensor.shape}, expected {projection_shape}")
            clip_head["projection"] = tensor.T
        elif not (name.endswith(IGNORED) or name.startswith(HEADS) or is_other_tower(name)):
            problems.add(f"surplus {name} {tensor.shape}")
    if problems:
        more = f" and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise WeightsError(
            f"{directory}: weights do not fit config.json: {'; '.join(sorted(problems)[:MAX_LISTED])}{more}"
        )
    arrays = {path: np.ascontiguousarray(conversion(x, shape)) for path, (x, shape, conversion) in sources.items()}
    params, constants = (
        flax.traverse_util.unflatten_dict({path: arrays[path] for path in flat_shapes.get(kind, {})})
        for kind in ("params", "constants")
    )
    return params, constants, clip_head["projection"], clip_head["logit_scale"]
