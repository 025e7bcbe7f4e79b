"""What Hugging Face's checkpoints of BERT, ViT, CLIP and ResNet are in our modules.

A function an architecture, `(values of config.json, tensors) -> (module, rows, inputs, other)`: the Linen module; a row
`(tensor's name, our path, how to turn it)` for each parameter; inputs that its shapes can be had from; and which
tensors belong to the other tower of the same file.
"""

import jax.numpy as jnp
import numpy as np

from mefn_jax.encoders.bert import BERT
from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.encoders.vit import ViT

# How a tensor is turned: functions of (tensor, wanted shape), which give None where it cannot be.


def _same(x, shape):
    return x.reshape(shape) if x.size == np.prod(shape) else None


def _dense(x, shape):
    """PyTorch's (out, in) to (in, out); either may be split over heads, (in, H, d) or (H, d, out)."""
    return x.T.reshape(shape) if x.ndim == 2 and x.size == np.prod(shape) else None


def _conv(x, shape):
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else None


def _first(x, shape):
    """The class token's position, which comes first."""
    return x.reshape(-1, x.shape[-1])[:1].reshape(1, 1, -1)


def _rest(x, shape):
    return x.reshape(-1, x.shape[-1])[1:][None]


def _norm(theirs: str, *path) -> list:
    return [(f"{theirs}.weight", (*path, "scale"), _same), (f"{theirs}.bias", (*path, "bias"), _same)]


def _linear(theirs: str, *path, bias: bool = True) -> list:
    rows = [(f"{theirs}.weight", (*path, "kernel"), _dense)]
    return [*rows, (f"{theirs}.bias", (*path, "bias"), _same)] if bias else rows


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
        segments=c["type_vocab_size"],
        pooler=p + "pooler.dense.weight" in tensors,
        **_sizes(c),
    )
    rows = [
        (f"{p}embeddings.{theirs}_embeddings.weight", (ours, "embedding"), _same)
        for ours, theirs in (("words", "word"), ("positions", "position"), ("segments", "token_type"))
    ]
    rows += _norm(f"{p}embeddings.LayerNorm", "norm")
    for k in range(module.layers):
        rows += _block(f"layer_{k}", _BERT_BLOCK, f"{p}encoder.layer.{k}.")
    if module.pooler:
        rows += _linear(f"{p}pooler.dense", "pooler")
    return module, rows, _text_inputs(), _no_other


def _grid(c: dict) -> tuple[int, int]:
    size, patch = c["image_size"], c["patch_size"]
    return size // patch, size // patch


def _vit(c: dict, tensors: dict):
    p = _prefix(tensors, "embeddings.cls_token", "", "vit.")
    pooler = p + "pooler.dense.weight" in tensors
    bias = c["qkv_bias"]
    module = ViT(
        patch=c["patch_size"],
        pool="tanh" if pooler else "class",
        table=_grid(c),
        bias=bias,
        **_sizes(c),
    )
    rows = [
        (f"{p}embeddings.cls_token", ("class",), _same),
        (f"{p}embeddings.position_embeddings", ("class_position",), _first),
        (f"{p}embeddings.position_embeddings", ("positions",), _rest),
        (f"{p}embeddings.patch_embeddings.projection.weight", ("patches", "kernel"), _conv),
        (f"{p}embeddings.patch_embeddings.projection.bias", ("patches", "bias"), _same),
        *_norm(f"{p}layernorm", "norm"),
    ]
    for k in range(module.layers):
        rows += _block(f"layer_{k}", _VIT_BLOCK, f"{p}encoder.layer.{k}.", bias)
    if pooler:
        rows += _linear(f"{p}pooler.dense", "pooler")
    return module, rows, (jnp.zeros((1, c["image_size"], c["image_size"], 3)),), _no_other


def _clip_vision(c: dict, tensors: dict):
    p = _prefix(tensors, "embeddings.class_embedding", "vision_model.", "")
    module = ViT(patch=c["patch_size"], pool="class", table=_grid(c), embed_norm=True, **_sizes(c))
    rows = [
        (f"{p}embeddings.class_embedding", ("class",), _same),
        (f"{p}embeddings.position_embedding.weight", ("class_position",), _first),
        (f"{p}embeddings.position_embedding.weight", ("positions",), _rest),
        (f"{p}embeddings.patch_embedding.weight", ("patches", "kernel"), _conv),
        *_norm(f"{p}pre_layrnorm", "embed_norm"),
        *_norm(f"{p}post_layernorm", "norm"),
    ]
    for k in range(module.layers):
        rows += _block(f"layer_{k}", _CLIP_BLOCK, f"{p}encoder.layers.{k}.")
    size = c["image_size"]
    return module, rows, (jnp.zeros((1, size, size, 3)),), lambda n: n.startswith(("text_model.", "text_projection."))


def _clip_text(c: dict, tensors: dict):
    p = _prefix(tensors, "embeddings.token_embedding.weight", "text_model.", "")
    module = CLIPText(vocab_size=c["vocab_size"], max_positions=c["max_position_embeddings"], **_sizes(c))
    rows = [
        (f"{p}embeddings.token_embedding.weight", ("words", "embedding"), _same),
        (f"{p}embeddings.position_embedding.weight", ("positions", "embedding"), _same),
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
        stride_first=c["downsample_in_bottleneck"],
        stride_all=c["downsample_in_first_stage"],
    )

    def conv_norm(theirs, *path):
        *block, name = path
        statistics = (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var"))
        return [(f"{theirs}.convolution.weight", (*block, name, "kernel"), _conv)] + [
            (f"{theirs}.normalization.{a}", (*block, f"{name}_norm", b), _same) for a, b in statistics
        ]

    rows = conv_norm(f"{p}embedder.embedder", "stem")
    for s, depth in enumerate(module.depths):
        for b in range(depth):
            theirs, ours = f"{p}encoder.stages.{s}.layers.{b}", f"stage_{s}_block_{b}"
            for k in range(3 if bottleneck else 2):
                rows += conv_norm(f"{theirs}.layer.{k}", ours, f"conv_{k + 1}")
            before = module.widths[s] if b else (module.stem_width, *module.widths)[s]
            if before != module.widths[s] or (b == 0 and (s > 0 or module.stride_all)):
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
