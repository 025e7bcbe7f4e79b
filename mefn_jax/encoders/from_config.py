"""The encoders that a configuration describes."""

import functools

from ml_collections import ConfigDict

from mefn_jax.encoders.bert import BERT
from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.gru import GRU
from mefn_jax.encoders.image import ImageEncoder
from mefn_jax.encoders.regions import RegionEncoder
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.encoders.siglip_text import SigLIPText
from mefn_jax.encoders.text import CachedTextEncoder, TextEncoder
from mefn_jax.encoders.vit import ViT


def build_grid_encoder(backbone, config: ConfigDict) -> ImageEncoder:
    """Builds the encoder of pixels on a backbone: a class whose options are the section `config.image.ARCH`."""
    c = config.image
    tower = backbone(**c[c.arch], dtype=config.train.dtype, remat=config.train.remat)
    region_grids, mean, std = (tuple(x) for x in (c.region_grids, c.mean, c.std))
    dropout = config.augment.region_dropout
    return ImageEncoder(tower, config.embed_dim, region_grids, mean, std, c.pooling, dropout)


def build_region_encoder(config: ConfigDict) -> RegionEncoder:
    """Builds the encoder of precomputed regions."""
    c, dropout = config.image, config.augment.region_dropout
    pooling, r = "mean" if c.pooling == "tower" else c.pooling, c.regions
    return RegionEncoder(config.embed_dim, r.projection, pooling, dropout, r.channel_dropout, r.grid, r.power_norm)


def build_token_encoder(backbone, config: ConfigDict, vocab_size: int) -> TextEncoder:
    """Builds the encoder of tokens on a backbone: a class whose options are the section `config.text.ARCH`."""
    c = config.text
    tower = backbone(vocab_size=vocab_size, **c[c.arch], dtype=config.train.dtype, remat=config.train.remat)
    return TextEncoder(tower, config.embed_dim, c.pooling, c.channel_dropout, c.start_token)


def build_gru_encoder(config: ConfigDict, vocab_size: int) -> TextEncoder:
    """Builds the GRU's encoder, whose states are not projected."""
    c = config.text
    tower = GRU(vocab_size, width=config.embed_dim, **c.gru)
    return TextEncoder(tower, 0, c.pooling, start_token=c.start_token)


def build_cached_encoder(config: ConfigDict, vocab_size: int) -> CachedTextEncoder:
    """Builds the encoder of cached text."""
    c = config.text
    return CachedTextEncoder(config.embed_dim, "mean" if c.pooling == "tower" else c.pooling, c.channel_dropout)


# Encoders by the name of `image.arch`, functions of the configuration, ...
IMAGE_ENCODERS = {
    "resnet": functools.partial(build_grid_encoder, ResNet),
    "vit": functools.partial(build_grid_encoder, ViT),
    "regions": build_region_encoder,
}
# ... and by that of `text.arch`, functions of the configuration and of the number of tokens.
TEXT_ENCODERS = {
    "bert": functools.partial(build_token_encoder, BERT),
    "clip": functools.partial(build_token_encoder, CLIPText),
    "siglip": functools.partial(build_token_encoder, SigLIPText),
    "gru": build_gru_encoder,
    "cached": build_cached_encoder,
}


def build_image_encoder(config: ConfigDict) -> ImageEncoder | RegionEncoder:
    """Builds the image encoder that a configuration describes."""
    return IMAGE_ENCODERS[config.image.arch](config)


def build_text_encoder(config: ConfigDict, vocab_size: int) -> TextEncoder | CachedTextEncoder:
    """Builds the text encoder that a configuration describes; `vocab_size` is the tokenizer's."""
    return TEXT_ENCODERS[config.text.arch](config, config.text.vocab_size or vocab_size)
