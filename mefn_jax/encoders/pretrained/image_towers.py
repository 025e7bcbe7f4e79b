"""Mapping of image towers: ViT, CLIP's, SigLIP's, DINOv2, DINOv3 and ResNet.

Each function takes the object of config.json and the tensors' headers, and returns a `Mapping`.
"""

import jax
import jax.numpy as jnp

from mefn_jax.encoders.pretrained.mapping import (
    CLIP_BLOCK,
    CLIP_REST,
    CONV,
    DENSE,
    FIRST,
    FLAT,
    SAME,
    TABLE,
    VIT_REST,
    Mapping,
    check_square,
    find_prefix,
    make_pixels,
    map_block,
    map_linear,
    map_norm,
    map_parts,
    read_bounded,
    read_patch_grid,
    read_sizes,
)
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.encoders.vit import ViT

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
_DINOV2_BLOCK = _VIT_BLOCK | {
    "norm_1": "norm1",
    "layer_scale_1": "layer_scale1.lambda1",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
    "norm_2": "norm2",
    "layer_scale_2": "layer_scale2.lambda1",
}
_DINOV3_BLOCK = _DINOV2_BLOCK | {
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "out": "attention.o_proj",
    "mlp_in": "mlp.up_proj",
    "mlp_out": "mlp.down_proj",
}
MAX_REGISTERS = 1024


def map_vit(c: dict, tensors: dict) -> Mapping:
    """Maps ViT."""
    p = find_prefix(tensors, "embeddings.cls_token", "", "vit.")
    pooler = p + "pooler.dense.weight" in tensors
    bias = c["qkv_bias"]
    module = ViT(pool="pooler" if pooler else "class", qkv_bias=bias, **read_patch_grid(c), **read_sizes(c))
    rows = [*_map_vit_embeddings(p), *map_norm(f"{p}layernorm", "norm")]
    for k in range(module.layers):
        rows += map_block(f"layer_{k}", _VIT_BLOCK, f"{p}encoder.layer.{k}.", bias)
    if pooler:
        rows += map_linear(f"{p}pooler.dense", "pooler")
    return Mapping(module, rows, make_pixels(module))


def _map_vit_embeddings(p: str) -> list:
    """Returns the rows of the embeddings of ViT and DINOv2."""
    return [
        (f"{p}embeddings.cls_token", ("class",), SAME),
        (f"{p}embeddings.position_embeddings", ("class_position",), FIRST),
        (f"{p}embeddings.position_embeddings", ("positions",), VIT_REST),
        (f"{p}embeddings.patch_embeddings.projection.weight", ("patches", "kernel"), CONV),
        (f"{p}embeddings.patch_embeddings.projection.bias", ("patches", "bias"), SAME),
    ]


def map_clip_vision(c: dict, tensors: dict) -> Mapping:
    """Maps CLIP's image tower."""
    p = find_prefix(tensors, "embeddings.class_embedding", "vision_model.", "")
    module = ViT(pool="class", embed_norm=True, **read_patch_grid(c), **read_sizes(c))
    rows = [
        (f"{p}embeddings.class_embedding", ("class",), FLAT),
        (f"{p}embeddings.position_embedding.weight", ("class_position",), FIRST),
        (f"{p}embeddings.position_embedding.weight", ("positions",), CLIP_REST),
        (f"{p}embeddings.patch_embedding.weight", ("patches", "kernel"), CONV),
        *map_norm(f"{p}pre_layrnorm", "embed_norm"),
        *map_norm(f"{p}post_layernorm", "norm"),
    ]
    for k in range(module.layers):
        rows += map_block(f"layer_{k}", CLIP_BLOCK, f"{p}encoder.layers.{k}.")
    projection = "visual_projection.weight", DENSE, (c["hidden_size"], c["projection_dim"])
    return Mapping(module, rows, make_pixels(module), ("text_model.", "text_projection."), projection)


def map_siglip_vision(c: dict, tensors: dict) -> Mapping:
    """Maps SigLIP's and SigLIP 2's image tower of a fixed resolution; without its head, the patches are averaged."""
    p = find_prefix(tensors, "embeddings.patch_embedding.weight", "vision_model.", "")
    has_head = c["vision_use_head"]
    module = ViT(pool="attention" if has_head else "mean", **read_patch_grid(c), **read_sizes(c))
    rows = [
        (f"{p}embeddings.position_embedding.weight", ("positions",), TABLE),
        (f"{p}embeddings.patch_embedding.weight", ("patches", "kernel"), CONV),
        (f"{p}embeddings.patch_embedding.bias", ("patches", "bias"), SAME),
        *map_norm(f"{p}post_layernorm", "norm"),
    ]
    for k in range(module.layers):
        rows += map_block(f"layer_{k}", CLIP_BLOCK, f"{p}encoder.layers.{k}.")
    if has_head:
        rows += [
            (f"{p}head.probe", ("head", "probe"), SAME),
            *map_parts(
                f"{p}head.attention.in_proj_weight",
                f"{p}head.attention.in_proj_bias",
                ("head",),
                ("query", "key", "value"),
            ),
            *map_linear(f"{p}head.attention.out_proj", "head", "out"),
            *map_norm(f"{p}head.layernorm", "head", "norm"),
            *map_linear(f"{p}head.mlp.fc1", "head", "mlp_in"),
            *map_linear(f"{p}head.mlp.fc2", "head", "mlp_out"),
        ]
    joint_width = module.width if has_head else 0
    return Mapping(module, rows, make_pixels(module), ("text_model.",), joint_width=joint_width)


def map_dinov2(c: dict, tensors: dict) -> Mapping:
    """Maps DINOv2, with registers if the file has some; the giant's MLP is gated."""
    p = find_prefix(tensors, "embeddings.cls_token", "", "dinov2.", "dinov2_with_registers.")
    gated, bias = c["use_swiglu_ffn"], c["qkv_bias"]
    registers = read_bounded(c, "num_register_tokens", 1, MAX_REGISTERS) if "num_register_tokens" in c else 0
    mlp_width = int(c["hidden_size"] * read_bounded(c, "mlp_ratio", 0, 64))
    if gated:
        mlp_width = (int(mlp_width * 2 / 3) + 7) // 8 * 8
    sizes = read_sizes(c | {"intermediate_size": mlp_width}) | ({"activation": "silu"} if gated else {})
    module = ViT(
        pool="class",
        registers=registers,
        # The authors' code and `transformers` smooth the positions of the checkpoints with registers only.
        antialias=bool(registers),
        layer_scale=True,
        gated=gated,
        qkv_bias=bias,
        **read_patch_grid(c),
        **sizes,
    )
    rows = [*_map_vit_embeddings(p), *map_norm(f"{p}layernorm", "norm")]
    if registers:
        rows.append((f"{p}embeddings.register_tokens", ("registers",), SAME))
    block = {k: v for k, v in _DINOV2_BLOCK.items() if not (gated and k.startswith("mlp"))}
    for k in range(module.layers):
        layer = f"{p}encoder.layer.{k}."
        rows += map_block(f"layer_{k}", block, layer, bias)
        if gated:
            w = f"{layer}mlp.weights_in"
            rows += map_parts(f"{w}.weight", f"{w}.bias", (f"layer_{k}",), ("mlp_gate", "mlp_in"))
            rows += map_linear(f"{layer}mlp.weights_out", f"layer_{k}", "mlp_out")
    return Mapping(module, rows, make_pixels(module))


def map_dinov3(c: dict, tensors: dict) -> Mapping:
    """Maps DINOv3's ViT, whose attention is rotated in place of a position table."""
    registers, gated = read_bounded(c, "num_register_tokens", 0, MAX_REGISTERS), c["use_gated_mlp"]
    module = ViT(
        patch=check_square(c["patch_size"], "patch_size"),
        pool="class",
        registers=registers,
        rotation_base=float(read_bounded(c, "rope_theta", 1, 1e9)),
        layer_scale=True,
        gated=gated,
        key_bias=c["key_bias"],
        **read_sizes(c),
    )
    if module.width % (4 * module.heads):
        raise ValueError(f"hidden_size {module.width} is no multiple of 4 for each of the {module.heads} heads")
    rows = [
        ("embeddings.cls_token", ("class",), SAME),
        ("embeddings.patch_embeddings.weight", ("patches", "kernel"), CONV),
        ("embeddings.patch_embeddings.bias", ("patches", "bias"), SAME),
        *map_norm("norm", "norm"),
    ]
    if registers:
        rows.append(("embeddings.register_tokens", ("registers",), SAME))
    block = _DINOV3_BLOCK | ({"mlp_gate": "mlp.gate_proj"} if gated else {})
    p = find_prefix(tensors, "layer.0.norm1.weight", "", "model.")
    for k in range(module.layers):
        rows += map_block(f"layer_{k}", block, f"{p}layer.{k}.", key_bias=module.key_bias)
    return Mapping(module, rows, make_pixels(module))


def map_resnet(c: dict, tensors: dict) -> Mapping:
    """Maps ResNet."""
    p = find_prefix(tensors, "embedder.embedder.convolution.weight", "", "resnet.")
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
    return Mapping(module, rows, (jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),))
