"""Named towers: the options of `config.image` and `config.text` that stand for a checkpoint's sizes and preprocessing.

They serve to compile, to estimate memory, and to train from random initialization. With `image.pretrained` and
`text.pretrained`, the checkpoint's own sizes, preprocessing and tokenizer take their place (docs/training.md has a
table of checkpoints).
"""

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
BASE = {"width": 768, "layers": 12, "heads": 12, "mlp_width": 3072}
SO400M = {"width": 1152, "layers": 27, "heads": 16, "mlp_width": 4304}
GRIDS = (7, 4, 2)  # regions of a ViT's patches


def _vit(size: dict, normalization: dict, vit: dict, **image) -> dict:
    """Returns the options of a ViT."""
    return {"arch": "vit", "vit": size | vit, "region_grids": GRIDS, **normalization, **image}


_SIGLIP = {"pool": "attention", "activation": "gelu_pytorch_tanh"}
_DINO = {"pool": "class", "layer_scale": True}
_DINO_PIXELS = {"crop": 224 / 256, "resample": "bicubic"}
_SQUASH = {"resize": "squash", "resample": "bicubic"}
IMAGES = {
    "resnet101": {"arch": "resnet", "resnet": {"depths": (3, 4, 23, 3)}, **IMAGENET},
    "resnet50": {"arch": "resnet", "resnet": {"depths": (3, 4, 6, 3)}, **IMAGENET},
    "vit_b16": _vit(BASE, HALF, {"patch": 16, "pool": "class"}),
    "clip_vit_b32": _vit(
        BASE, CLIP, {"patch": 32, "pool": "class", "embed_norm": True, "activation": "quick_gelu", "eps": 1e-5}
    ),
    "siglip_b16": _vit(BASE, HALF, _SIGLIP | {"patch": 16}, **_SQUASH),
    "siglip2_b16": _vit(BASE, HALF, _SIGLIP | {"patch": 16}, **_SQUASH),
    "siglip2_so400m": _vit(SO400M, HALF, _SIGLIP | {"patch": 14}, **_SQUASH),
    "dinov2_b14": _vit(BASE, IMAGENET, _DINO | {"patch": 14, "position_grid": (37, 37)}, **_DINO_PIXELS),
    "dinov2_reg_b14": _vit(
        BASE,
        IMAGENET,
        _DINO | {"patch": 14, "position_grid": (37, 37), "registers": 4, "antialias": True},
        **_DINO_PIXELS,
    ),
    "dinov3_b16": _vit(
        BASE,
        IMAGENET,
        _DINO | {"patch": 16, "registers": 4, "rotation_base": 100.0, "key_bias": False, "eps": 1e-5},
        resize="squash",
    ),
    "regions": {"arch": "regions", "regions": {"projection": "mlp"}, "pooling": "gpo"},  # as in VSE-infinity
}
_ROBERTA = {"max_positions": 514, "type_vocab_size": 1, "eps": 1e-5}
TEXTS = {
    "bert": {"arch": "bert"},  # the default sizes: BERT-base
    "roberta": {"arch": "bert", "bert": _ROBERTA},
    "xlmr": {"arch": "bert", "bert": _ROBERTA},
    "distilbert": {"arch": "bert", "bert": {"layers": 6, "type_vocab_size": 0}},
    "mpnet": {"arch": "bert", "bert": _ROBERTA | {"type_vocab_size": 0, "distance_buckets": 32}},
    "clip": {"arch": "clip", "max_tokens": 75},  # CLIP ViT-B's sizes; the longest text that it reads
    "siglip": {"arch": "siglip", "max_tokens": 62},  # SigLIP B's sizes; it reads 64 tokens, one or two of them no words
    "siglip2": {"arch": "siglip", "max_tokens": 62},
    "gru": {"arch": "gru"},  # SCAN's
}
