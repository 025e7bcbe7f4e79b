"""The inputs of the encoders: their shapes, and empty ones."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

DEFAULT_NUM_REGIONS = 36  # precomputed regions of an image, as in SCAN's data, where only shapes are needed


def dummy_images(config: ConfigDict, number: int = 1):
    """Returns zeros in the shape that the image encoder takes: uint8 `(number, H, W, 3)`, or float32 `(number, 1, C)`
    for precomputed regions."""
    if config.image.arch == "regions":
        return jnp.zeros((number, 1, config.image.regions.width), jnp.float32)
    return jnp.zeros((number, config.image.size, config.image.size, 3), jnp.uint8)


def dummy_texts(config: ConfigDict, number: int = 1):
    """Returns empty texts in the shape that the text encoder takes, `(number, L)`: ids int32 (or cached words float16
    `(number, M, C)`), and the mask, bool."""
    if config.text.arch == "cached":
        shape = number, config.text.max_tokens
        return jnp.zeros((*shape, config.text.cached.width), jnp.float16), jnp.ones(shape, bool)
    shape = number, config.text.max_tokens + 1 + config.text.start_token
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
    digest = jax.ShapeDtypeStruct((size, 2), jnp.int32)
    shapes = {"images": images, "text": text, "text_mask": text_mask, "text_digest": digest}
    return shapes | {
        name: jax.ShapeDtypeStruct((size,), jnp.int32) for name in ("image_index", "caption_index", "epoch", "view")
    }
