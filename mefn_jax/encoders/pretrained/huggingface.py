"""Mapping of Hugging Face's checkpoints of BERT, ViT, CLIP and ResNet to our modules.

Each architecture has one function `(c, tensors) -> (module, rows, inputs, is_other_tower)`, where `c` is the object of
config.json. It returns the Linen module; a row `(tensor's name, path of our parameter, Conversion)` for each parameter;
inputs from which the module's shapes follow; and a function `name -> bool` that is True for tensors of the other tower
in the same file.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mefn_jax.encoders.bert import BERT
from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.encoders.vit import ViT


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
# Conversions of a position table whose first row belongs to the class token: that row, and the rest.
FIRST = Conversion(lambda s: None, lambda x, s: x.reshape(-1, s[-1])[:1].reshape(s))
VIT_REST = Conversion(lambda s: (1, 1 + s[1], s[2]), lambda x, s: x[:, 1:])
CLIP_REST = Conversion(lambda s: (1 + s[1], s[2]), lambda x, s: x[None, 1:])


def _map_norm(source: str, *path) -> list:
    """Returns the rows of a LayerNorm."""
    return [(f"{source}.weight", (*path, "scale"), SAME), (f"{source}.bias", (*path, "bias"), SAME)]


def _map_linear(source: str, *path, bias: bool = True) -> list:
    """Returns the rows of a linear layer."""
    rows = [(f"{source}.weight", (*path, "kernel"), DENSE)]
    return [*rows, (f"{source}.bias", (*path, "bias"), SAME)] if bias else rows


def _map_block(layer: str, names: dict, prefix: str, bias: bool = True) -> list:
    """Returns the rows of a Transformer block; `names` maps our names of its layers to theirs."""
    rows = []
    for ours in ("query", "key", "value", "out"):
        rows += _map_linear(prefix + names[ours], layer, "attention", ours, bias=bias or ours == "out")
    for ours in ("mlp_in", "mlp_out"):
        rows += _map_linear(prefix + names[ours], layer, ours)
    for ours in ("norm_1", "norm_2"):
        rows += _map_norm(prefix + names[ours], layer, ours)
    return rows


_BERT_BLOCK = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm_1": "attention.output.LayerNorm",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "norm_2": "output.LayerNorm",
}
_VIT_BLOCK = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "out": "attention.output.dense",
    "norm_1": "layernorm_before",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "norm_2": "layernorm_after",
}
_CLIP_BLOCK = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "norm_1": "layer_norm1",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
    "norm_2": "layer_norm2",
}


def _find_prefix(tensors: dict, name: str, *prefixes: str) -> str:
    """Returns the first of `prefixes` that the file's names have, "" if none fits. In models with a head, the tower's
    name stands in front."""
    return next((p for p in prefixes if p + name in tensors), "")


def _is_never_other(name: str) -> bool:
    """Returns False for every tensor: the file has one tower only."""
    return False


def _make_text():
    """Returns shape and type of token ids and mask of one text."""
    return jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), bool)


def _make_pixels(module: ViT):
    """Returns shape and type of the pixels of one image, of the size that the position table was made for."""
    return (jax.ShapeDtypeStruct((1, *(n * module.patch for n in module.position_grid), 3), jnp.float32),)


def _read_sizes(c: dict) -> dict:
    """Returns the fields that all Transformer towers have."""
    return {
        "width": c["hidden_size"],
        "layers": c["num_hidden_layers"],
        "heads": c["num_attention_heads"],
        "mlp_width": c["intermediate_size"],
        "activation": c["hidden_act"],
        "eps": c["layer_norm_eps"],
    }


def _map_bert(c: dict, tensors: dict):
    p = _find_prefix(tensors, "embeddings.word_embeddings.weight", "", "bert.")
    module = BERT(
        vocab_size=c["vocab_size"],
        max_positions=c["max_position_embeddings"],
        type_vocab_size=c["type_vocab_size"],
        pooler=p + "pooler.dense.weight" in tensors,
        **_read_sizes(c),
    )
    rows = [
        (f"{p}embeddings.{theirs}_embeddings.weight", (ours, "embedding"), SAME)
        for ours, theirs in (("words", "word"), ("positions", "position"), ("segments", "token_type"))
    ]
    rows += _map_norm(f"{p}embeddings.LayerNorm", "norm")
    for k in range(module.layers):
        rows += _map_block(f"layer_{k}", _BERT_BLOCK, f"{p}encoder.layer.{k}.")
    if module.pooler:
        rows += _map_linear(f"{p}pooler.dense", "pooler")
    return module, rows, _make_text(), _is_never_other


def _read_patch_grid(c: dict) -> dict:
    """Returns a ViT's patch size and the grid of its position table. Raises ValueError for sizes that are no square or
    give no patch."""
    size, patch = (_check_square(c[key], key) for key in ("image_size", "patch_size"))
    if size < patch:
        raise ValueError(f"image_size {size} is smaller than patch_size {patch}")
    return {"patch": patch, "position_grid": (size // patch, size // patch)}


def _check_square(value, key: str) -> int:
    """Returns the side of a square that is given as a number or as equal numbers. Raises ValueError if they differ."""
    sides = {*value} if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise ValueError(f"{key} {value} is not square; only squares are supported")
    return sides.pop()


def _map_vit(c: dict, tensors: dict):
    p = _find_prefix(tensors, "embeddings.cls_token", "", "vit.")
    pooler = p + "pooler.dense.weight" in tensors
    bias = c["qkv_bias"]
    module = ViT(pool="pooler" if pooler else "class", qkv_bias=bias, **_read_patch_grid(c), **_read_sizes(c))
    rows = [
        (f"{p}embeddings.cls_token", ("class",), SAME),
        (f"{p}embeddings.position_embeddings", ("class_position",), FIRST),
        (f"{p}embeddings.position_embeddings", ("positions",), VIT_REST),
        (f"{p}embeddings.patch_embeddings.projection.weight", ("patches", "kernel"), CONV),
        (f"{p}embeddings.patch_embeddings.projection.bias", ("patches", "bias"), SAME),
        *_map_norm(f"{p}layernorm", "norm"),
    ]
    for k in range(module.layers):
        rows += _map_block(f"layer_{k}", _VIT_BLOCK, f"{p}encoder.layer.{k}.", bias)
    if pooler:
        rows += _map_linear(f"{p}pooler.dense", "pooler")
    return module, rows, _make_pixels(module), _is_never_other


def _map_clip_vision(c: dict, tensors: dict):
    p = _find_prefix(tensors, "embeddings.class_embedding", "vision_model.", "")
    module = ViT(pool="class", embed_norm=True, **_read_patch_grid(c), **_read_sizes(c))
    rows = [
        (f"{p}embeddings.class_embedding", ("class",), FLAT),
        (f"{p}embeddings.position_embedding.weight", ("class_position",), FIRST),
        (f"{p}embeddings.position_embedding.weight", ("positions",), CLIP_REST),
        (f"{p}embeddings.patch_embedding.weight", ("patches", "kernel"), CONV),
        *_map_norm(f"{p}pre_layrnorm", "embed_norm"),
        *_map_norm(f"{p}post_layernorm", "norm"),
    ]
    for k in range(module.layers):
        rows += _map_block(f"layer_{k}", _CLIP_BLOCK, f"{p}encoder.layers.{k}.")
    return module, rows, _make_pixels(module), lambda n: n.startswith(("text_model.", "text_projection."))


def _map_clip_text(c: dict, tensors: dict):
    p = _find_prefix(tensors, "embeddings.token_embedding.weight", "text_model.", "")
    module = CLIPText(vocab_size=c["vocab_size"], max_positions=c["max_position_embeddings"], **_read_sizes(c))
    rows = [
        (f"{p}embeddings.token_embedding.weight", ("words", "embedding"), SAME),
        (f"{p}embeddings.position_embedding.weight", ("positions", "embedding"), SAME),
        *_map_norm(f"{p}final_layer_norm", "norm"),
    ]
    for k in range(module.layers):
        rows += _map_block(f"layer_{k}", _CLIP_BLOCK, f"{p}encoder.layers.{k}.")
    return module, rows, _make_text(), lambda n: n.startswith(("vision_model.", "visual_projection."))


def _map_resnet(c: dict, tensors: dict):
    p = _find_prefix(tensors, "embedder.embedder.convolution.weight", "", "resnet.")
    bottleneck = c["layer_type"] == "bottleneck"
    if len(c["depths"]) != len(c["hidden_sizes"]) or not c["depths"]:
        raise ValueError("depths and hidden_sizes must hold a number for each stage")
    module = ResNet(
        stem_width=c["embedding_size"],
        depths=tuple(c["depths"]),
        widths=tuple(c["hidden_sizes"]),
        bottleneck=bottleneck,
        stem_pool=True,
        norm="batch",
        stride_in_1x1=c["downsample_in_bottleneck"],
        downsample_first_stage=c["downsample_in_first_stage"],
    )

    def map_conv_norm(source, *target):
        *block, name = target
        statistics = (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var"))
        return [(f"{source}.convolution.weight", (*block, name, "kernel"), CONV)] + [
            (f"{source}.normalization.{a}", (*block, f"{name}_norm", b), SAME) for a, b in statistics
        ]

    rows = map_conv_norm(f"{p}embedder.embedder", "stem")
    for s, depth in enumerate(module.depths):
        for b in range(depth):
            theirs, ours = f"{p}encoder.stages.{s}.layers.{b}", f"stage_{s}_block_{b}"
            for k in range(3 if bottleneck else 2):
                rows += map_conv_norm(f"{theirs}.layer.{k}", ours, f"conv_{k + 1}")
            in_width = module.widths[s] if b else (module.stem_width, *module.widths)[s]
            if in_width != module.widths[s] or (b == 0 and (s > 0 or module.downsample_first_stage)):
                rows += map_conv_norm(f"{theirs}.shortcut", ours, "shortcut")
    return module, rows, (jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),), _is_never_other


# Options of config.json that are supported with a single value only.
BUILT = {"position_embedding_type": "absolute", "is_decoder": False, "pooler_act": "tanh"}

# Kind of tower, `model_type` in config.json, function.
ARCHITECTURES = [
    ("text", "bert", _map_bert),
    ("image", "vit", _map_vit),
    ("image", "resnet", _map_resnet),
    ("image", "clip", _map_clip_vision),
    ("image", "clip_vision_model", _map_clip_vision),
    ("text", "clip", _map_clip_text),
    ("text", "clip_text_model", _map_clip_text),
]
