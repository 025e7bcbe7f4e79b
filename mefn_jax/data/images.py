"""JPEG bytes to a square array: decode, resize, crop. Normalisation happens on the device (`normalise`)."""

import io

import jax.numpy as jnp
import numpy as np
from PIL import Image

from mefn_jax.errors import DataError


def decode(data: bytes, size: int, name: str) -> np.ndarray:
    """Decodes, scales the shorter side to `size`, crops the centre: uint8 `(size, size, 3)`, RGB.

    Raises DataError naming the image (`name`) if it is not a complete image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            # libjpeg decodes at 1/2, 1/4 or 1/8 where that is still at least the size asked for.
            image.draft("RGB", (size, size))
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise DataError(f"image {name!r} cannot be decoded ({e}); replace it, or set data.skip_bad=True") from None
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    # Resizing straight from the box of the crop touches only the pixels that are kept.
    box = (left / width, top / height, (left + size) / width, (top + size) / height)
    box = tuple(b * side for b, side in zip(box, image.size * 2, strict=True))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0))


def normalise(pixels, mean: tuple, std: tuple):
    """uint8 `(B, H, W, 3)` to float32 of zero mean and unit deviation; `mean`, `std` per channel in [0, 1]."""
    return (pixels.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)
