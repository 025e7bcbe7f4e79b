"""Models by name: two encoders and a matcher (docs/method.md)."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mefn_jax import losses
from mefn_jax.data.images import RESAMPLE, RESIZE_MODES
from mefn_jax.encoders.bert import BERT
from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.grids import grid_boxes
from mefn_jax.encoders.gru import GRU
from mefn_jax.encoders.image import ImageEncoder
from mefn_jax.encoders.pooling import POOLINGS
from mefn_jax.encoders.regions import PROJECTIONS, RegionEncoder
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.encoders.text import CachedTextEncoder, TextEncoder
from mefn_jax.encoders.transformer import ACTIVATIONS, REMAT
from mefn_jax.encoders.vit import ViT
from mefn_jax.features import Features
from mefn_jax.matching.cosine import PooledCosine
from mefn_jax.matching.entropy import ENTROPIES
from mefn_jax.matching.mefn import DIRECTIONS, GLOBAL_INPUTS, MEFN
from mefn_jax.matching.scan import SCAN
from mefn_jax.scoring.layouts import PackedTexts, PaddedTexts, RegionBlock

# Each system's matcher class and the arguments that make it that system. The other arguments of MEFN come from
# `config.matcher`. SCAN's constants are those of its authors on Flickr30K.
MODELS = {
    "mefn": (MEFN, {}),
    "mefn_no_entropy": (MEFN, {"entropy": "none"}),
    "mefn_no_local": (MEFN, {"branches": "global"}),
    "mefn_no_global": (MEFN, {"branches": "local"}),
    "vsepp": (PooledCosine, {}),
    "scan_t2i_lse": (SCAN, {"direction": "t2i", "aggregate": "lse", "inverse_temperature": 9.0, "lse_factor": 6.0}),
    "scan_t2i_avg": (SCAN, {"direction": "t2i", "aggregate": "avg", "inverse_temperature": 9.0}),
    "scan_i2t_lse": (SCAN, {"direction": "i2t", "aggregate": "lse", "inverse_temperature": 4.0, "lse_factor": 5.0}),
    "scan_i2t_avg": (SCAN, {"direction": "i2t", "aggregate": "avg", "inverse_temperature": 4.0}),
    "clip": (PooledCosine, {}),
}
DEFAULT_NUM_REGIONS = 36  # precomputed regions of an image, as in SCAN's data, where only shapes are needed
# The values that an option may have.
MODEL_CHOICES = {
    "model": tuple(MODELS),
    "image.resize": RESIZE_MODES,
    "image.resample": tuple(RESAMPLE),
    "image.pooling": ("tower", *POOLINGS),
    "image.regions.projection": PROJECTIONS,
    "image.vit.activation": tuple(ACTIVATIONS),
    "text.bert.activation": tuple(ACTIVATIONS),
    "text.clip.activation": tuple(ACTIVATIONS),
    "train.remat": tuple(REMAT),
    "text.arch": ("bert", "clip", "gru", "cached"),
    "text.pooling": ("tower", *POOLINGS),
    "matcher.entropy": tuple(ENTROPIES),
    "matcher.local": DIRECTIONS,
    "matcher.global_input": GLOBAL_INPUTS,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """Two encoders and a matcher, as pure functions of `params = {"image", "text", "matcher", "loss"}`.

    Attributes:
        image, text: the encoders, from pixels, regions or tokens to Features.
        matcher: scores all pairs of Features.
        loss: initial values of the loss's learned parameters (`losses.initial_params`).
    """

    image: nn.Module
    text: nn.Module
    matcher: nn.Module
    loss: dict

    def init(self, key: jax.Array, images, ids, mask) -> dict:
        """Returns random parameters. The inputs, those of `encode_images` and `encode_texts`, give the shapes."""
        image_key, text_key, matcher_key = jax.random.split(key, 3)
        image = self.image.init(image_key, images)
        text = self.text.init(text_key, ids, mask)
        features = self.image.apply(image, images), self.text.apply(text, ids, mask)
        matcher = self.matcher.init(matcher_key, *features)
        loss = {name: jnp.float32(value) for name, value in self.loss.items()}
        return {"image": image["params"], "text": text["params"], "matcher": matcher.get("params", {}), "loss": loss}

    def encode_images(self, params, images, dropout_key=None, keys=None) -> Features:
        """Returns the Features of images, uint8 pixels `(B, H, W, 3)` or precomputed regions float `(B, N, C)`. With a
        `dropout_key`, and random `keys (B,)` of the items, they are encoded as in training."""
        return _encode(self.image, params["image"], dropout_key, images, keys=keys)

    def encode_texts(self, params, ids, mask, dropout_key=None) -> Features:
        """Returns the Features of texts: token ids int32 `(B, L)` or cached words float `(B, M, C)`, and their mask,
        bool. With a `dropout_key`, they are encoded as in training."""
        return _encode(self.text, params["text"], dropout_key, ids, mask)

    def score(self, params, images: Features, texts: Features) -> jax.Array:
        """Returns the scores of all pairs, float32 `(I, T)`: cosine scale, higher is better."""
        return self.matcher.apply({"params": params["matcher"]}, images, texts)

    def score_tile(self, params, regions: RegionBlock, words: PaddedTexts | PackedTexts) -> jax.Array:
        """Returns the scores `(I, T)` of one tile, from the layouts of `scoring/layouts.py`, before `hub_offsets` are
        subtracted; only for a matcher with `has_tile`."""
        return self.matcher.apply({"params": params["matcher"]}, regions, words, method="score_tile")

    def hub_offsets(self, params, images: Features, texts: Features) -> tuple[jax.Array, jax.Array]:
        """Returns the hubness offsets to subtract from the scores of `score_tile`: of each image, float32 `(I,)`, and
        of each text, `(T,)`; zeros for a matcher without them."""
        if not hasattr(self.matcher, "hub_offsets"):
            return jnp.zeros(len(images.mask)), jnp.zeros(len(texts.mask))
        return self.matcher.apply({"params": params["matcher"]}, images, texts, method="hub_offsets")

    @property
    def has_tile(self) -> bool:
        """Returns whether the matcher has `score_tile` and so can score packed texts, which is faster."""
        return hasattr(self.matcher, "score_tile")

    @property
    def is_dual_encoder(self) -> bool:
        """Returns whether the score of a pair is the product of its two embeddings (docs/method.md, Eq. 40)."""
        return isinstance(self.matcher, PooledCosine)

    def embed(self, params, features: Features) -> jax.Array:
        """Returns one vector for each image or text, float32 `(B, D)`, for candidates and indexes."""
        return self.matcher.apply({"params": params["matcher"]}, features, method="embed")

    def explain(self, params, image: Features, text: Features) -> dict:
        """Returns the terms of one pair (Features without batch axis) that the matcher computes; see `MEFN.explain`."""
        return self.matcher.apply({"params": params["matcher"]}, image, text, method="explain")

    def scalars(self, params) -> dict:
        """Returns the matcher's learned scalars by name; empty for a matcher without any."""
        if not hasattr(self.matcher, "scalars"):
            return {}
        return self.matcher.apply({"params": params["matcher"]}, method="scalars")


def _encode(encoder, params, dropout_key, *inputs, **options) -> Features:
    """Applies an encoder: deterministically without a `dropout_key`, else as in training."""
    if dropout_key is None:
        return encoder.apply({"params": params}, *inputs, **options)
    rngs = {"dropout": dropout_key}
    return encoder.apply({"params": params}, *inputs, deterministic=False, rngs=rngs, **options)


def build_model(config: ConfigDict, vocab_size: int) -> Model:
    """Builds the model that a configuration describes; `vocab_size` is the tokenizer's."""
    matcher, system_options = MODELS[config.model]
    options = (config.matcher.to_dict() | system_options) if matcher is MEFN else system_options
    loss = losses.LOSSES[config.loss.name].initial
    return Model(build_image_encoder(config), build_text_encoder(config, vocab_size), matcher(**options), loss)


def build_image_encoder(config: ConfigDict) -> ImageEncoder | RegionEncoder:
    """Builds the image encoder that a configuration describes."""
    c, dropout = config.image, config.augment.region_dropout
    if c.arch == "regions":
        pooling = "mean" if c.pooling == "tower" else c.pooling
        r = c.regions
        return RegionEncoder(config.embed_dim, r.projection, pooling, dropout, r.channel_dropout, r.grid, r.power_norm)
    run_options = {"dtype": config.train.dtype, "remat": config.train.remat}
    backbone = ResNet(**c.resnet, **run_options) if c.arch == "resnet" else ViT(**c.vit, **run_options)
    region_grids, mean, std = (tuple(x) for x in (c.region_grids, c.mean, c.std))
    return ImageEncoder(backbone, config.embed_dim, region_grids, mean, std, c.pooling, dropout)


def dummy_images(config: ConfigDict, number: int = 1):
    """Returns zeros in the shape that the image encoder takes: uint8 `(number, H, W, 3)`, or float32 `(number, 1, C)`
    for precomputed regions."""
    if config.image.arch == "regions":
        return jnp.zeros((number, 1, config.image.regions.width), jnp.float32)
    return jnp.zeros((number, config.image.size, config.image.size, 3), jnp.uint8)


def region_boxes(config: ConfigDict, model: Model):
    """Returns the boxes of the regions, float64 `(N, 4)`: x0, y0, x1, y1 as fractions of the image's width and height.
    None for an encoder without grids: precomputed regions come without boxes."""
    if config.image.arch == "regions" or not hasattr(model.image, "backbone_features"):
        return None
    shapes = jax.eval_shape(model.image.init, jax.random.key(0), dummy_images(config))
    backbone_features = functools.partial(model.image.apply, method="backbone_features")
    grids, _ = jax.eval_shape(backbone_features, shapes, dummy_images(config))
    return np.concatenate([grid_boxes(*grid.shape[1:3]) for grid in grids])


def dummy_texts(config: ConfigDict, number: int = 1):
    """Returns empty texts in the shape that the text encoder takes, `(number, L)`: ids int32 (or cached words float16
    `(number, M, C)`), and the mask, bool."""
    if config.text.arch == "cached":
        shape = number, config.text.max_tokens
        return jnp.zeros((*shape, config.text.cached.width), jnp.float16), jnp.ones(shape, bool)
    shape = number, config.text.max_tokens + 2
    return jnp.ones(shape, jnp.int32), jnp.ones(shape, bool)


def dummy_inputs(config: ConfigDict, number: int = 1) -> tuple:
    """Returns `number` empty images and texts: the inputs of `Model.init` after the key."""
    return dummy_images(config, number), *dummy_texts(config, number)


def batch_shapes(config: ConfigDict) -> dict:
    """Returns the shapes of a batch of `training_dataset` in `data/pipeline.py`. Images with precomputed regions are
    assumed to have DEFAULT_NUM_REGIONS."""
    size = config.train.batch_size
    images = jax.eval_shape(lambda: dummy_images(config, size))
    if config.image.arch == "regions":
        images = jax.ShapeDtypeStruct((size, DEFAULT_NUM_REGIONS, images.shape[2]), images.dtype)
    text, text_mask = jax.eval_shape(lambda: dummy_texts(config, size))
    shapes = {"images": images, "text": text, "text_mask": text_mask}
    return shapes | {
        name: jax.ShapeDtypeStruct((size,), jnp.int32) for name in ("image_index", "caption_index", "epoch")
    }


def build_text_encoder(config: ConfigDict, vocab_size: int) -> TextEncoder | CachedTextEncoder:
    """Builds the text encoder that a configuration describes; `vocab_size` is the tokenizer's."""
    c, run_options = config.text, {"dtype": config.train.dtype, "remat": config.train.remat}
    vocab_size = c.vocab_size or vocab_size
    if c.arch == "cached":
        return CachedTextEncoder(config.embed_dim, "mean" if c.pooling == "tower" else c.pooling, c.channel_dropout)
    if c.arch == "gru":
        return TextEncoder(GRU(vocab_size, width=config.embed_dim, **c.gru), 0, c.pooling)
    tower = CLIPText if c.arch == "clip" else BERT
    return TextEncoder(
        tower(vocab_size=vocab_size, **c[c.arch], **run_options), config.embed_dim, c.pooling, c.channel_dropout
    )
