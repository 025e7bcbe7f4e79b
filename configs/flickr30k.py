"""Flickr30K with full-size towers: MEFN on ResNet-101 and BERT-base, 224 px, as the paper describes it.

    python train.py --config=configs/flickr30k.py --config.data.dir=data/flickr30k \\
        --config.image.pretrained=RESNET --config.text.pretrained=BERT

`RESNET` and `BERT` are checkpoints in Hugging Face layout: directories or hub names (microsoft/resnet-101,
bert-base-uncased). Regions come from three scales: C3, C4 and C5 of a ResNet, or the patch grid of a ViT, pooled. Other
towers: `:image=resnet50`, `:image=vit_b16`, `:image=clip_vit_b32,text=clip`, `:text=gru`. Precomputed regions, as SCAN
distributes them: `:image=regions --config.data.dir=data/f30k_precomp`. Meant for accelerators. We have not trained it
at full size, so there is no number to expect yet.
"""

from configs import default
from mefn_jax.config import parse_arg
from mefn_jax.errors import ConfigError

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
VIT_BASE = {"width": 768, "layers": 12, "heads": 12, "mlp_width": 3072}
IMAGES = {
    "resnet101": {"arch": "resnet", "resnet": {"depths": (3, 4, 23, 3)}, **IMAGENET},
    "resnet50": {"arch": "resnet", "resnet": {"depths": (3, 4, 6, 3)}, **IMAGENET},
    "vit_b16": {"arch": "vit", "vit": VIT_BASE | {"patch": 16, "pool": "class"}, "region_grids": (7, 4, 2), **HALF},
    "clip_vit_b32": {
        "arch": "vit",
        "vit": VIT_BASE | {"patch": 32, "pool": "class", "embed_norm": True, "activation": "quick_gelu", "eps": 1e-5},
        "region_grids": (7, 4, 2),
        **CLIP,
    },
    "regions": {"arch": "regions", "regions": {"projection": "mlp"}, "pooling": "gpo"},  # as in VSE-infinity
}
TEXTS = ("bert", "clip", "gru")  # with default sizes: BERT-base, CLIP ViT-B, SCAN


def get_config(arg=""):
    """Returns the configuration, locked. `arg`: model, image, text and smoke."""
    options = parse_arg(arg, model="mefn", smoke=False, image="resnet101", text="bert")
    for name, choices in (("image", IMAGES), ("text", TEXTS)):
        if options[name] not in choices:
            raise ConfigError(f"{name}={options[name]} is not one of {', '.join(choices)}")
    c = default.base(options["model"])
    c.data.dir = "data/flickr30k"
    c.embed_dim = 512
    c.image.region_grids = (7, 7, 7)  # C3, C4 and C5
    c.image.update(IMAGES[options["image"]])
    c.text.arch = options["text"]
    c.augment.update(word_noise=0.2)
    c.augment.update({"region_dropout": 0.2} if options["image"] == "regions" else {"crop": 0.5, "flip": 0.5})
    if options["text"] == "clip":
        c.text.max_tokens = 75  # the longest text that CLIP reads
    c.train.update(epochs=30.0, batch_size=128, learning_rate=5e-4)
    # Pretrained towers learn more slowly than new parameters (VSE-infinity's factor for BERT). Precomputed regions have
    # no tower, and a GRU is never pretrained.
    pretrained = {"image": c.image.arch != "regions", "text": c.text.arch != "gru"}
    c.train.lr_multipliers = tuple(f"{kind}/backbone:0.1" for kind in pretrained if pretrained[kind])
    return default.finish(c, options)
