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

import flax.linen as nn
import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from mefn_jax.encoders.huggingface import ARCHITECTURES, BUILT
from mefn_jax.encoders.transformer import ACTIVATIONS
from mefn_jax.errors import WeightsError

# Buffers and heads for other tasks, which a retrieval model has no use for.
IGNORED = ("position_ids", "num_batches_tracked")
HEADS = ("cls.", "classifier.", "logit_scale")
TRAINING = ("dropout", "stochastic_depth", "dtype", "remat")  # a module's options that a checkpoint does not decide
FILES = ("*.json", "*.safetensors", "vocab.txt", "merges.txt")  # what is fetched of a checkpoint
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclasses.dataclass(frozen=True)
class Tower:
    """A Linen module `(inputs, ..., deterministic) -> (fragments' states, pooled)`, its parameters (a nested dict of
    float32 arrays), and the projection of `pooled` into CLIP's joint space `(C, D)`, or None."""

    module: nn.Module
    params: dict
    projection: np.ndarray | None


def load(directory, kind: str) -> Tower:
    """The "image" or "text" tower in a directory. Raises WeightsError if there is none that we can build, naming what
    is wrong: the architecture, the option, or each missing, surplus or misshapen tensor."""
    directory = Path(directory)
    config = read_config(directory)
    known = {(k, name): build for k, name, build in ARCHITECTURES}
    name = config.get("model_type")
    if (kind, name) not in known:
        there = ", ".join(n for k, n in known if k == kind)
        raise WeightsError(f"{directory}: model_type {name!r} is no {kind} tower that can be loaded; there are {there}")
    tensors = read_tensors(directory)
    values = config.get({"image": "vision_config", "text": "text_config"}[kind], config)
    # Of a ResNet, Hugging Face uses the option in some blocks and ReLU in others: nothing to be equal to.
    activations = ("relu",) if name == "resnet" else tuple(ACTIVATIONS)
    if values["hidden_act"] not in activations:
        raise WeightsError(
            f"{directory}/config.json: hidden_act {values['hidden_act']!r} is not one of {', '.join(activations)}"
        )
    for option, value in BUILT.items():
        if values.get(option, value) != value:
            raise WeightsError(f"{directory}/config.json: {option} {values[option]!r} is not built, only {value!r}")
    module, table, inputs, other = known[kind, name](values, tensors)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    params, projection = _assign(directory, tensors, table, shapes, other)
    return Tower(module, params, projection)


def options(module: nn.Module) -> dict:
    """The sizes that a tower's module was made with, by name; not how it is trained (TRAINING)."""
    skipped = ("parent", "name", *TRAINING)
    return {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name not in skipped}


def find(name: str) -> Path:
    """The directory of a checkpoint: `name` itself, or the local copy of what the Hugging Face hub has by this name,
    fetched where there is a network. Raises WeightsError where there is neither."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise WeightsError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (OSError, ValueError) as e:
        raise WeightsError(
            f"{name}: no such directory here, nor to be had from the Hugging Face hub ({type(e).__name__}). Where "
            f"there is a network, run: hf download {name} --local-dir DIR; copy DIR to this machine and give its path"
        ) from None


def preprocessing(directory) -> dict:
    """What the checkpoint's `preprocessor_config.json` says, as options of `config.image`: size, fit, crop, resample,
    mean and std, as far as it says them; empty without that file. Raises WeightsError for a square that is none."""
    path = Path(directory) / "preprocessor_config.json"
    if not path.is_file():
        return {}
    found = _json(path)
    wanted = {ours: tuple(found[f"image_{ours}"]) for ours in ("mean", "std") if f"image_{ours}" in found}
    if found.get("resample") in RESAMPLE:
        wanted["resample"] = RESAMPLE[found["resample"]]
    size, crop = _sides(found.get("size")), _sides(found.get("crop_size"))
    if len(set(size)) > 1 or len(set(crop)) > 1:
        raise WeightsError(
            f"{path}: size {found.get('size')}, crop_size {found.get('crop_size')}: only squares are built"
        )
    if "crop_pct" in found:  # ConvNeXt's processor, which ResNets come with: it squashes from 384 pixels on
        return (
            wanted
            | {"size": size[0]}
            | ({"fit": "crop", "crop": float(found["crop_pct"])} if size[0] < 384 else {"fit": "squash", "crop": 1.0})
        )
    if crop and found.get("do_center_crop", True):
        return wanted | {"size": crop[0], "fit": "crop", "crop": crop[0] / size[0] if size else 1.0}
    return wanted | ({"size": size[0], "fit": "squash", "crop": 1.0} if size else {})


def _sides(size) -> tuple:
    """`224`, `{"shortest_edge": 224}` or `{"height": 224, "width": 224}` as a tuple of numbers; () for none."""
    if isinstance(size, dict):
        return tuple(size.values())
    return () if size is None else (size,)


def tokenizer_json(directory: Path) -> str:
    """The checkpoint's tokenizer as the text of a `tokenizer.json`, made from `vocab.txt` or `vocab.json` where it
    comes so. Raises WeightsError without any."""
    path = directory / "tokenizer.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if not any((directory / name).is_file() for name in ("vocab.txt", "vocab.json")):
        raise WeightsError(f"{path}: no such file, nor vocab.txt or vocab.json; copy them from the checkpoint's source")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
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
    config = _json(path)
    if config.get("model_type") not in {name for _, name, _ in ARCHITECTURES}:
        return config  # `load` refuses it
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoConfig  # slow to import

    try:
        return AutoConfig.for_model(**config).to_dict()
    except Exception as e:  # of many kinds
        raise WeightsError(f"{path}: {_first_line(e)}") from None


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise WeightsError(f"{path}: is not JSON ({e})") from None


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
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [n for n in names if not (directory / n).is_file()]
        if missing:
            raise WeightsError(f"{directory}: lacks {', '.join(missing)}, which {index.name} lists; copy them too")
        return [directory / n for n in names]
    if single.is_file():
        return [single]
    pickles = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
    if pickles:
        raise WeightsError(
            f"{pickles[0]}: a pickle may run code when it is read and is refused; convert it where torch is: python -c "
            '"import torch, safetensors.torch as s; s.save_file({k: v.contiguous().clone() for k, v in torch.load('
            f"'{pickles[0].name}', weights_only=True).items()}}, 'model.safetensors')\""
        )
    raise WeightsError(f"{single}: no such file")


def _assign(directory, tensors: dict, table: list, shapes: dict, other: Callable) -> tuple[dict, np.ndarray | None]:
    """Parameters from tensors by the table. `other(name)` is true of tensors that belong to the other tower."""
    params, used, problems = {}, set(), []
    for name, path, turn in table:
        names = (name,) if isinstance(name, str) else name
        name = next((n for n in names if n in tensors), names[0])
        if name not in tensors:
            problems.append(f"missing {name}")
            continue
        used.add(name)
        leaf = shapes
        for part in path:
            leaf = leaf[part]
        value = turn(tensors[name], leaf.shape)
        if value is None or value.shape != leaf.shape:
            problems.append(f"{name} has shape {tensors[name].shape}, which does not give {leaf.shape}")
            continue
        target = params
        for part in path[:-1]:
            target = target.setdefault(part, {})
        target[path[-1]] = np.ascontiguousarray(value, dtype=np.float32)
    projection = None
    for name in tensors.keys() - used:
        if name.endswith("_projection.weight") and not other(name):
            projection = tensors[name].T
        elif not (name.endswith(IGNORED) or name.startswith(HEADS) or other(name)):
            problems.append(f"surplus {name} {tensors[name].shape}")
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise WeightsError(f"{directory}: weights do not fit config.json: {'; '.join(sorted(problems)[:12])}{more}")
    return params, projection
