"""Flickr30K with full-size towers: MEFN on ResNet-101 and BERT-base, 224 px, as the paper describes it.

    python train.py --config=configs/flickr30k.py --config.data.dir=data/flickr30k \\
        --config.image.pretrained=RESNET --config.text.pretrained=BERT

`RESNET` and `BERT` are checkpoints in Hugging Face layout: directories or hub names (microsoft/resnet-101,
bert-base-uncased). Regions come from three scales: C3, C4 and C5 of a ResNet, or the patch grid of a ViT, pooled. Other
towers (`configs/towers.py`): `:image=resnet50`, `:image=vit_b16`, `:image=clip_vit_b32,text=clip`, `:text=gru`; for a
new study, `:image=siglip2_b16,text=siglip2` or `:image=dinov2_b14,text=xlmr`. Precomputed regions, as SCAN distributes
them: `:image=regions --config.data.dir=data/f30k_precomp`. Meant for accelerators. We have not trained it
at full size, so there is no number to expect yet.
"""

from mefn_jax.configs.towers import IMAGES, TEXTS

from mefn_jax.config import parse_arg
from mefn_jax.configs import default
from mefn_jax.errors import ConfigError


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
    c.text.update(TEXTS[options["text"]])
    c.augment.update(word_noise=0.2)
    c.augment.update({"region_dropout": 0.2} if options["image"] == "regions" else {"crop": 0.5, "flip": 0.5})
    c.train.update(epochs=30.0, batch_size=128, learning_rate=5e-4)
    # Pretrained towers learn more slowly than new parameters (VSE-infinity's factor for BERT). Precomputed regions have
    # no tower, and a GRU is never pretrained.
    pretrained = {"image": c.image.arch != "regions", "text": c.text.arch != "gru"}
    c.train.lr_multipliers = tuple(f"{kind}/backbone:0.1" for kind in pretrained if pretrained[kind])
    return default.finish(c, options)
