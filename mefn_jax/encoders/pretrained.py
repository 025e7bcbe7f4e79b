"""Pretrained towers from a directory in Hugging Face layout: `config.json` and safetensors, no torch.

`load(directory, kind)` gives the Linen module that the configuration describes and its parameters. Every tensor of the
file is accounted for; `huggingface.py` says which becomes which parameter.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from mefn_jax.encoders.huggingface import ARCHITECTURES
from mefn_jax.encoders.transformer import ACTIVATIONS
from mefn_jax.errors import WeightsError

# Buffers and heads for other tasks, which a retrieval model has no use for.
IGNORED = ("position_ids", "num_batches_tracked")
HEADS = ("cls.", "classifier.", "logit_scale")


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
    try:
        module, table, inputs, other = known[kind, name](values, tensors)
    except KeyError as e:
        raise WeightsError(f"{directory}/config.json: no value for {e}") from None
    # Of a ResNet, Hugging Face uses the option in some blocks and ReLU in others: nothing to be equal to.
    activations = ("relu",) if name == "resnet" else tuple(ACTIVATIONS)
    if values["hidden_act"] not in activations:
        raise WeightsError(
            f"{directory}/config.json: hidden_act {values['hidden_act']!r} is not one of {', '.join(activations)}"
        )
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    params, projection = _assign(directory, tensors, table, shapes, other)
    return Tower(module, params, projection)


def options(module: nn.Module) -> dict:
    """The arguments that a tower's module was made with."""
    return {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name not in ("parent", "name")}


def normalisation(directory) -> tuple[tuple, tuple] | None:
    """The channels' mean and deviation that the checkpoint's `preprocessor_config.json` names; None without one."""
    path = Path(directory) / "preprocessor_config.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return (tuple(found["image_mean"]), tuple(found["image_std"])) if "image_mean" in found else None


def read_config(directory: Path) -> dict:
    """The checkpoint's `config.json`. Raises WeightsError if there is none."""
    path = directory / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise WeightsError(
            f"{path}: no such file; give the directory of a Hugging Face checkpoint (config.json, model.safetensors)"
        ) from None
    except ValueError as e:
        raise WeightsError(f"{path}: is not JSON ({e})") from None


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
