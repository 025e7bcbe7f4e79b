"""Pretrained towers from a directory in Hugging Face layout: `config.json` and safetensors, no torch.

`load(directory, kind)` gives the Linen module that the configuration describes and its parameters. Every tensor of the
file is accounted for. A table per architecture says which tensor becomes which parameter: rows of
`(tensor's name, our path, how to turn it)`.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from mefn_jax.encoders.bert import BERT
from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.encoders.transformer import ACTIVATIONS
from mefn_jax.encoders.vit import ViT
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
        dropout=c.get("hidden_dropout_prob", 0.0),
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
    bias = c.get("qkv_bias", True)
    module = ViT(
        patch=c["patch_size"],
        pool="tanh" if pooler else "class",
        table=_grid(c),
        bias=bias,
        dropout=c.get("hidden_dropout_prob", 0.0),
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
        stride_first=c.get("downsample_in_bottleneck", False),
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


ARCHITECTURES = [
    ("text", "bert", _bert),
    ("image", "vit", _vit),
    ("image", "resnet", _resnet),
    ("image", "clip", _clip_vision),
    ("image", "clip_vision_model", _clip_vision),
    ("text", "clip", _clip_text),
    ("text", "clip_text_model", _clip_text),
]
