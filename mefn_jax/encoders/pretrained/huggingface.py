"""What Hugging Face's checkpoints of BERT, ViT, CLIP and ResNet are in our modules.

A function an architecture, `(values of config.json, tensors) -> (module, rows, inputs, other)`: the Linen module; a row
`(tensor's name, our path, how to turn it)` for each parameter; inputs that its shapes can be had from; and which
tensors belong to the other tower of the same file.
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp

from mefn_jax.encoders.bert import BERT
from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.encoders.vit import ViT


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How a tensor becomes a parameter of a shape: `theirs(shape)` is the shape that the tensor must have, None where
    another row of the same tensor says it; `turn(tensor, shape)` is the parameter."""

    source_shape: Callable
    convert: Callable


SAME = Conversion(lambda s: s, lambda x, s: x)
FLAT = Conversion(lambda s: (math.prod(s),), lambda x, s: x.reshape(s))
DENSE = Conversion(lambda s: s[::-1], lambda x, s: x.T)
CONV = Conversion(lambda s: (s[3], s[2], s[0], s[1]), lambda x, s: x.transpose(2, 3, 1, 0))
# A table of positions, the class token's first.
FIRST = Conversion(lambda s: None, lambda x, s: x.reshape(-1, s[-1])[:1].reshape(s))
VIT_REST = Conversion(lambda s: (1, 1 + s[1], s[2]), lambda x, s: x[:, 1:])
CLIP_REST = Conversion(lambda s: (1 + s[1], s[2]), lambda x, s: x[None, 1:])


def _norm(theirs: str, *path) -> list:
    return [(f"{theirs}.weight", (*path, "scale"), SAME), (f"{theirs}.bias", (*path, "bias"), SAME)]


def _linear(theirs: str, *path, bias: bool = True) -> list:
    rows = [(f"{theirs}.weight", (*path, "kernel"), DENSE)]
    return [*rows, (f"{theirs}.bias", (*path, "bias"), SAME)] if bias else rows


def _block(layer: str, names: dict, prefix: str, bias: bool = True) -> list:
    """A block's rows; `names` are theirs for ours."""
    rows = []
    for ours in ("query", "key", "value", "out"):
        rows += _linear(prefix + names[ours], layer, "attention", ours, bias=bias or ours == "out")
    for ours in ("mlp_in", "mlp_out"):
        rows += _linear(prefix + names[ours], layer, ours)
    for ours in ("norm_1", "norm_2"):
        rows += _norm(prefix + names[ours], layer, ours)
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


def _prefix(tensors: dict, name: str, *prefixes: str) -> str:
    """Which prefix the file's names have: models with a head put the tower's name in front."""
    return next((p for p in prefixes if p + name in tensors), "")


def _no_other(name: str) -> bool:
    return False


def _text_inputs():
    return jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)


def _pixels(module: ViT):
    return (jnp.zeros((1, *(n * module.patch for n in module.position_grid), 3)),)


def _sizes(c: dict) -> dict:
    return {
        "width": c["hidden_size"],
        "layers": c["num_hidden_layers"],
        "heads": c["num_attention_heads"],
        "mlp_width": c["intermediate_size"],
        "activation": c["hidden_act"],
        "eps": c["layer_norm_eps"],
    }


def _bert(c: dict, tensors: dict):
    p = _prefix(tensors, "embeddings.word_embeddings.weight", "", "bert.")
    module = BERT(
        vocab_size=c["vocab_size"],
        max_positions=c["max_position_embeddings"],
        type_vocab_size=c["type_vocab_size"],
        pooler=p + "pooler.dense.weight" in tensors,
        **_sizes(c),
    )
    rows = [
        (f"{p}embeddings.{theirs}_embeddings.weight", (ours, "embedding"), SAME)
        for ours, theirs in (("words", "word"), ("positions", "position"), ("segments", "token_type"))
    ]
    rows += _norm(f"{p}embeddings.LayerNorm", "norm")
    for k in range(module.layers):
        rows += _block(f"layer_{k}", _BERT_BLOCK, f"{p}encoder.layer.{k}.")
    if module.pooler:
        rows += _linear(f"{p}pooler.dense", "pooler")
    return module, rows, _text_inputs(), _no_other


def _patches(c: dict) -> dict:
    """The patch size, and the grid that the position table is of."""
    size, patch = (_side(c[key], key) for key in ("image_size", "patch_size"))
    return {"patch": patch, "position_grid": (size // patch, size // patch)}


def _side(value, key: str) -> int:
    sides = {*value} if isinstance(value, list | tuple) else {value}
    if len(sides) > 1:
        raise ValueError(f"{key} {value} is not square, which is not built")
    return sides.pop()


def _vit(c: dict, tensors: dict):
    p = _prefix(tensors, "embeddings.cls_token", "", "vit.")
    pooler = p + "pooler.dense.weight" in tensors
    bias = c["qkv_bias"]
    module = ViT(pool="pooler" if pooler else "class", qkv_bias=bias, **_patches(c), **_sizes(c))
    rows = [
        (f"{p}embeddings.cls_token", ("class",), SAME),
        (f"{p}embeddings.position_embeddings", ("class_position",), FIRST),
        (f"{p}embeddings.position_embeddings", ("positions",), VIT_REST),
        (f"{p}embeddings.patch_embeddings.projection.weight", ("patches", "kernel"), CONV),
        (f"{p}embeddings.patch_embeddings.projection.bias", ("patches", "bias"), SAME),
        *_norm(f"{p}layernorm", "norm"),
    ]
    for k in range(module.layers):
        rows += _block(f"layer_{k}", _VIT_BLOCK, f"{p}encoder.layer.{k}.", bias)
    if pooler:
        rows += _linear(f"{p}pooler.dense", "pooler")
    return module, rows, _pixels(module), _no_other


def _clip_vision(c: dict, tensors: dict):
    p = _prefix(tensors, "embeddings.class_embedding", "vision_model.", "")
    module = ViT(pool="class", embed_norm=True, **_patches(c), **_sizes(c))
    rows = [
        (f"{p}embeddings.class_embedding", ("class",), FLAT),
        (f"{p}embeddings.position_embedding.weight", ("class_position",), FIRST),
        (f"{p}embeddings.position_embedding.weight", ("positions",), CLIP_REST),
        (f"{p}embeddings.patch_embedding.weight", ("patches", "kernel"), CONV),
        *_norm(f"{p}pre_layrnorm", "embed_norm"),
        *_norm(f"{p}post_layernorm", "norm"),
    ]
    for k in range(module.layers):
        rows += _block(f"layer_{k}", _CLIP_BLOCK, f"{p}encoder.layers.{k}.")
    return module, rows, _pixels(module), lambda n: n.startswith(("text_model.", "text_projection."))


def _clip_text(c: dict, tensors: dict):
    p = _prefix(tensors, "embeddings.token_embedding.weight", "text_model.", "")
    module = CLIPText(vocab_size=c["vocab_size"], max_positions=c["max_position_embeddings"], **_sizes(c))
    rows = [
        (f"{p}embeddings.token_embedding.weight", ("words", "embedding"), SAME),
        (f"{p}embeddings.position_embedding.weight", ("positions", "embedding"), SAME),
        *_norm(f"{p}final_layer_norm", "norm"),
    ]
    for k in range(module.layers):
        rows += _block(f"layer_{k}", _CLIP_BLOCK, f"{p}encoder.layers.{k}.")
    return module, rows, _text_inputs(), lambda n: n.startswith(("vision_model.", "visual_projection."))


def _resnet(c: dict, tensors: dict):
    p = _prefix(tensors, "embedder.embedder.convolution.weight", "", "resnet.")
    bottleneck = c["layer_type"] == "bottleneck"
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

    def conv_norm(theirs, *path):
        *block, name = path
        statistics = (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var"))
        return [(f"{theirs}.convolution.weight", (*block, name, "kernel"), CONV)] + [
            (f"{theirs}.normalization.{a}", (*block, f"{name}_norm", b), SAME) for a, b in statistics
        ]

    rows = conv_norm(f"{p}embedder.embedder", "stem")
    for s, depth in enumerate(module.depths):
        for b in range(depth):
            theirs, ours = f"{p}encoder.stages.{s}.layers.{b}", f"stage_{s}_block_{b}"
            for k in range(3 if bottleneck else 2):
                rows += conv_norm(f"{theirs}.layer.{k}", ours, f"conv_{k + 1}")
            before = module.widths[s] if b else (module.stem_width, *module.widths)[s]
            if before != module.widths[s] or (b == 0 and (s > 0 or module.downsample_first_stage)):
                rows += conv_norm(f"{theirs}.shortcut", ours, "shortcut")
    return module, rows, (jnp.zeros((1, 64, 64, 3)),), _no_other


# What else a configuration may ask for, and the one value that is built.
BUILT = {"position_embedding_type": "absolute", "is_decoder": False, "pooler_act": "tanh"}

# The tower, `model_type` in config.json, the function.
ARCHITECTURES = [
    ("text", "bert", _bert),
    ("image", "vit", _vit),
    ("image", "resnet", _resnet),
    ("image", "clip", _clip_vision),
    ("image", "clip_vision_model", _clip_vision),
    ("text", "clip", _clip_text),
    ("text", "clip_text_model", _clip_text),
]
