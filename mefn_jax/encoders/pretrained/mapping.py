"""Rows that map the tensors of a checkpoint to parameters: conversions, and the layers that architectures share.

A row is `(tensor's name, path of our parameter, Conversion)`.
"""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Conversion of a checkpoint's tensor to a parameter of a given shape.

    Attributes:
        source_shape: a function `shape -> shape` that gives the tensor's expected shape, or None if another row of the
            same tensor checks it.
        convert: a function `(tensor, shape) -> parameter`.
    """

    source_shape: Callable
    convert: Callable


SAME = Conversion(lambda s: s, lambda x, s: x)
FLAT = Conversion(lambda s: (math.prod(s),), lambda x, s: x.reshape(s))
DENSE = Conversion(lambda s: s[::-1], lambda x, s: x.T)
CONV = Conversion(lambda s: (s[3], s[2], s[0], s[1]), lambda x, s: x.transpose(2, 3, 1, 0))
TABLE = Conversion(lambda s: s[1:], lambda x, s: x[None])  # a position table without a row for a class token
# Conversions of a position table whose first row belongs to the class token: that row, and the rest.
FIRST = Conversion(lambda s: None, lambda x, s: x.reshape(-1, s[-1])[:1].reshape(s))
VIT_REST = Conversion(lambda s: (1, 1 + s[1], s[2]), lambda x, s: x[:, 1:])
CLIP_REST = Conversion(lambda s: (1 + s[1], s[2]), lambda x, s: x[None, 1:])


def take_part(k: int, parts: int) -> Conversion:
    """Returns the conversion of a linear layer's tensor, weight or bias, that holds `parts` layers: of the k-th one."""
    return Conversion(lambda s: (parts * s[-1], *s[:-1]), lambda x, s: x.reshape(parts, s[-1], *s[:-1])[k].T)


@dataclasses.dataclass(frozen=True)
class Mapping:
    """What a checkpoint's tensors become.

    Attributes:
        module: the Linen module of the tower.
        rows: a row for each parameter and each stored statistic.
        inputs: shapes and types of inputs from which the module's shapes follow.
        other_tower: starts of the names of tensors that belong to the other tower in the same file.
        projection: of the pooled state into the joint space with the other tower: a row's name and Conversion, and the
            shape `(C, D)`; None without one.
        joint_width: D of towers whose pooled states are in the joint space already; 0 for others.
    """

    module: nn.Module
    rows: list
    inputs: tuple
    other_tower: tuple = ()
    projection: tuple | None = None
    joint_width: int = 0


def map_norm(source: str, *path) -> list:
    """Returns the rows of a LayerNorm."""
    return [(f"{source}.weight", (*path, "scale"), SAME), (f"{source}.bias", (*path, "bias"), SAME)]


def map_linear(source: str, *path, bias: bool = True) -> list:
    """Returns the rows of a linear layer."""
    rows = [(f"{source}.weight", (*path, "kernel"), DENSE)]
    return [*rows, (f"{source}.bias", (*path, "bias"), SAME)] if bias else rows


def map_parts(weight: str, bias: str, path: tuple, names: tuple) -> list:
    """Returns the rows of linear layers, our `names` below `path`, that one pair of tensors holds one after another."""
    rows = []
    for k, name in enumerate(names):
        part = take_part(k, len(names))
        rows += [(weight, (*path, name, "kernel"), part), (bias, (*path, name, "bias"), part)]
    return rows


def map_block(layer: str, names: dict, prefix: str, bias: bool = True, key_bias: bool = True) -> list:
    """Returns the rows of a Transformer block; `names` maps our names of its layers to theirs, without those that other
    rows map. `bias` says whether query, key and value have one, `key_bias` whether the key does."""
    rows = []
    for ours in ("query", "key", "value", "out"):
        if ours in names:
            has_bias = ours == "out" or (bias and (ours != "key" or key_bias))
            rows += map_linear(prefix + names[ours], layer, "attention", ours, bias=has_bias)
    for ours in ("mlp_in", "mlp_gate", "mlp_out"):
        rows += map_linear(prefix + names[ours], layer, ours) if ours in names else []
    for ours in ("norm_1", "norm_2"):
        rows += map_norm(prefix + names[ours], layer, ours)
    rows += [(prefix + names[k], (layer, k), SAME) for k in ("layer_scale_1", "layer_scale_2") if k in names]
    return rows


CLIP_BLOCK = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "norm_1": "layer_norm1",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
    "norm_2": "layer_norm2",
}


def find_prefix(tensors: dict, name: str, *prefixes: str) -> str:
    """Returns the first of `prefixes` with which the tensor `name` is in the file, "" if there is none: a checkpoint
    with a head on its tower puts the tower's name before each tensor's."""
    return next((p for p in prefixes if p + name in tensors), "")


def make_text():
    """Returns shape and type of token ids and mask of one text."""
    return jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), bool)


def make_pixels(module):
    """Returns shape and type of the pixels of one image for a ViT, of the size that its position table was made for."""
    grid = module.position_grid or (1, 1)
    return (jax.ShapeDtypeStruct((1, *(n * module.patch for n in grid), 3), jnp.float32),)


def read_sizes(c: dict) -> dict:
    """Returns the fields that all Transformer towers have."""
    return {
        "width": c["hidden_size"],
        "layers": c["num_hidden_layers"],
        "heads": c["num_attention_heads"],
        "mlp_width": c["intermediate_size"],
        "activation": c["hidden_act"],
        "eps": c["layer_norm_eps"],
    }


def read_patch_grid(c: dict) -> dict:
    """Returns a ViT's patch size and the grid of its position table. Raises ValueError for sizes that are no square or
    give no patch."""
    size, patch = (check_square(c[key], key) for key in ("image_size", "patch_size"))
    if size < patch:
        raise ValueError(f"image_size {size} is smaller than patch_size {patch}")
    return {"patch": patch, "position_grid": (size // patch, size // patch)}


def check_square(value, key: str) -> int:
    """Returns the side of a square that is given as a number or as equal numbers. Raises ValueError if they differ."""
    sides = {*value} if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise ValueError(f"{key} {value} is not square; only squares are supported")
    return sides.pop()


def read_bounded(c: dict, key: str, low: float, high: float):
    """Returns the number at `key`. Raises ValueError if it is no number in `low` to `high`."""
    value = c[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{key} {str(value)[:60]} must be a number in {low} to {high}")
    return value
