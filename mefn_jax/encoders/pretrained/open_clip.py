"""open_clip's layout: `open_clip_config.json` and `open_clip_model.safetensors`, of its own ViTs (B/32 to H/14).

The configuration is translated to the keys of Hugging Face's, and the tensors are mapped as theirs are.
"""

from pathlib import Path

from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.pretrained.files import read_object, read_section
from mefn_jax.encoders.pretrained.mapping import (
    CLIP_REST,
    CONV,
    FIRST,
    FLAT,
    SAME,
    Mapping,
    find_prefix,
    make_pixels,
    make_text,
    map_block,
    map_norm,
    map_parts,
    read_bounded,
    read_patch_grid,
    read_sizes,
)
from mefn_jax.encoders.vit import ViT
from mefn_jax.errors import WeightsError

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
MODEL_TYPE = "open_clip"
NORM_EPS = 1e-5  # of open_clip's norms
# Keys that are read, with open_clip's defaults, and keys without an effect on the outputs. Any other key is refused,
# unless it has the value that switches it off.
VISION = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
NEEDLESS = ("patch_dropout", "output_tokens", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pad_id")
OFF = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}
MODEL = ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale", "init_logit_bias")
INTERPOLATIONS = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers
RESIZE = ("shortest", "squash")
_BLOCK = {"out": "attn.out_proj", "norm_1": "ln_1", "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj", "norm_2": "ln_2"}


def is_open_clip(directory: Path) -> bool:
    """Returns whether a checkpoint is in open_clip's layout only: one that is in both is read as Hugging Face's."""
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def read_model_config(directory: Path) -> dict:
    """Returns the configuration with the keys of a CLIP's `config.json`. Raises WeightsError that names the key for a
    value that is missing, of the wrong type, or not supported."""
    path = directory / CONFIG
    model = read_section(path, read_object(path), "model_cfg")
    if model is None:
        raise WeightsError(f"{path}: has no model_cfg; copy it again")
    _refuse_others(path, "model_cfg", {k: v for k, v in model.items() if k not in MODEL})
    activation = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu", "layer_norm_eps": NORM_EPS}
    vision, text = _read_tower(path, model, "vision_cfg", VISION), _read_tower(path, model, "text_cfg", TEXT)
    heads = vision["width"] // max(1, vision["head_width"])
    return {
        "model_type": MODEL_TYPE,
        "projection_dim": _read_whole(path, "model_cfg.embed_dim", model.get("embed_dim")),
        "vision_config": activation
        | _translate(path, "vision_cfg", vision, heads)
        | {key: vision[key] for key in ("patch_size", "image_size")},
        "text_config": activation
        | _translate(path, "text_cfg", text, text["heads"])
        | {"max_position_embeddings": text["context_length"], "vocab_size": text["vocab_size"]}
        | {"eos_token_id": text["vocab_size"] - 1},  # the tower pools at the largest id
    }


def _read_tower(path: Path, model: dict, section: str, defaults: dict) -> dict:
    """Returns the values of a tower's section, completed by open_clip's defaults."""
    given = read_section(path, model, section)
    if given is None:
        raise WeightsError(f"{path}: model_cfg has no {section}; copy it again")
    _refuse_others(path, section, {k: v for k, v in given.items() if k not in defaults})
    values = defaults | {k: v for k, v in given.items() if k in defaults}
    for key, value in values.items():
        if key != "mlp_ratio" and not (section == "vision_cfg" and key == "image_size" and isinstance(value, list)):
            _read_whole(path, f"{section}.{key}", value)
    return values


def _refuse_others(path: Path, section: str, values: dict) -> None:
    """Raises WeightsError for the first key that is not supported and not switched off."""
    for key, value in values.items():
        if key not in NEEDLESS and value and value not in OFF.get(key, ()):
            raise WeightsError(f"{path}: {section}.{key} {str(value)[:60]!r} is not supported")


def _read_whole(path: Path, key: str, value) -> int:
    """Returns a whole number above 0. Raises WeightsError for another value."""
    if type(value) is not int or value < 1:
        raise WeightsError(f"{path}: {key} {str(value)[:60]} must be a whole number above 0")
    return value


def _translate(path: Path, section: str, values: dict, heads: int) -> dict:
    """Returns the sizes of a tower with the keys of Hugging Face's configurations."""
    try:
        mlp_width = int(values["width"] * read_bounded(values, "mlp_ratio", 0.01, 64))
    except ValueError as e:
        raise WeightsError(f"{path}: {section}.{e}") from None
    return {
        "hidden_size": values["width"],
        "num_hidden_layers": values["layers"],
        "num_attention_heads": heads,
        "intermediate_size": mlp_width,
    }


def read_image_settings(directory: Path) -> tuple[Path, dict]:
    """Returns the file, and its preprocessing of images as the settings of CLIP's image processor in `transformers`.
    Raises WeightsError, naming the key, for preprocessing that is not supported."""
    path = directory / CONFIG
    content = read_object(path)
    given = read_section(path, content, "preprocess_cfg") or {}
    size = given.get("size") or (read_section(path, content.get("model_cfg", {}), "vision_cfg") or {}).get("image_size")
    interpolation, mode = given.get("interpolation") or "bicubic", given.get("resize_mode") or "shortest"
    for key, value, names in (("interpolation", interpolation, INTERPOLATIONS), ("resize_mode", mode, RESIZE)):
        if value not in names:
            raise WeightsError(
                f"{path}: preprocess_cfg.{key} {str(value)[:60]!r} is not supported, only {', '.join(names)}"
            )
    size = 224 if size is None else size
    side = size[0] if isinstance(size, list) and len({*map(str, size)}) == 1 else size
    settings = {"size": {"shortest_edge": side}} if mode == "shortest" else {"size": {"height": side, "width": side}}
    settings |= {"crop_size": side, "do_center_crop": mode == "shortest", "resample": INTERPOLATIONS[interpolation]}
    return path, settings | {f"image_{key}": given[key] for key in ("mean", "std") if given.get(key) is not None}


def map_image(c: dict, tensors: dict) -> Mapping:
    """Maps open_clip's image tower. Its code smooths positions where it resizes them."""
    module = ViT(pool="class", embed_norm=True, antialias=True, **read_patch_grid(c), **read_sizes(c))
    rows = [
        ("visual.class_embedding", ("class",), FLAT),
        ("visual.positional_embedding", ("class_position",), FIRST),
        ("visual.positional_embedding", ("positions",), CLIP_REST),
        ("visual.conv1.weight", ("patches", "kernel"), CONV),
        *map_norm("visual.ln_pre", "embed_norm"),
        *map_norm("visual.ln_post", "norm"),
        *_map_blocks(module.layers, "visual."),
    ]
    projection = "visual.proj", SAME, (c["hidden_size"], c["projection_dim"])
    return Mapping(module, rows, make_pixels(module), _list_text_names(tensors), projection)


def _list_text_names(tensors: dict) -> tuple:
    """Returns the starts of the names of the text tower's tensors."""
    if any(name.startswith("text.") for name in tensors):
        return ("text.",)
    return ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def map_text(c: dict, tensors: dict) -> Mapping:
    """Maps open_clip's causal text tower."""
    p = find_prefix(tensors, "token_embedding.weight", "", "text.")
    module = CLIPText(vocab_size=c["vocab_size"], max_positions=c["max_position_embeddings"], **read_sizes(c))
    rows = [
        (f"{p}token_embedding.weight", ("words", "embedding"), SAME),
        (f"{p}positional_embedding", ("positions", "embedding"), SAME),
        *map_norm(f"{p}ln_final", "norm"),
        *_map_blocks(module.layers, p),
    ]
    projection = f"{p}text_projection", SAME, (c["hidden_size"], c["projection_dim"])
    return Mapping(module, rows, make_text(), ("visual.",), projection)


def _map_blocks(layers: int, prefix: str) -> list:
    """Returns the rows of all blocks of a tower: query, key and value are one tensor."""
    rows = []
    for k in range(layers):
        block = f"{prefix}transformer.resblocks.{k}."
        rows += map_block(f"layer_{k}", _BLOCK, block)
        parts = f"{block}attn.in_proj_weight", f"{block}attn.in_proj_bias"
        rows += map_parts(*parts, (f"layer_{k}", "attention"), ("query", "key", "value"))
    return rows
