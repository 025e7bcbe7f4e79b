"""JPEG bytes to a square array: decode, resize, crop or squash. Normalisation happens on the device (`normalise`)."""

import dataclasses
import io

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from mefn_jax.errors import DataError

RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
FITS = ("crop", "squash")


@dataclasses.dataclass(frozen=True)
class Resize:
    """How an image becomes a square.

    Attributes:
        size: pixels of its side.
        fit: "crop" scales the shorter side to `size / crop` pixels and cuts the centre square out; "squash" scales both
            sides to `size`, whatever the image's shape.
        crop: the share of the shorter side that is kept.
        resample: a name of RESAMPLE.
    """

    size: int
    fit: str = "crop"
    crop: float = 1.0
    resample: str = "bilinear"


def resize_of(image) -> Resize:
    """What `config.image` says of resizing."""
    return Resize(image.size, image.fit, image.crop, image.resample)


def decode(data: bytes, resize: Resize, name: str, augment=None, rng=None, may_flip=True) -> np.ndarray:
    """Decodes, turns upright as its EXIF says, and resizes: uint8 `(size, size, 3)`, RGB. Raises DataError naming the
    image (`name`) if it is not a complete image, or one of absurd size."""
    size = resize.size
    try:
        with Image.open(io.BytesIO(data)) as image:
            # libjpeg decodes at 1/2, 1/4 or 1/8 where that is still at least the size asked for.
            shorter = round(size / resize.crop)
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}")
            image.draft("RGB", (shorter, shorter))
            image = _rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise DataError(f"image {name!r} cannot be decoded ({e}); replace it, or set data.skip_bad=True") from None
    box = (0, 0, *image.size) if resize.fit == "squash" else _centre(image.size, shorter, size)
    return np.asarray(image.resize((size, size), RESAMPLE[resize.resample], box=box, reducing_gap=2.0))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _centre(sides: tuple[int, int], shorter: int, size: int) -> tuple:
    """The box, in pixels of the original, that is the centre square of `size` once the shorter side is `shorter`. The
    longer one is rounded down, as Hugging Face and torchvision do."""
    width, height = (side * shorter // min(sides) for side in sides)
    left, top = (width - size) // 2, (height - size) // 2
    # Resizing straight from the box of the crop touches only the pixels that are kept.
    box = (left / width, top / height, (left + size) / width, (top + size) / height)
    return tuple(b * side for b, side in zip(box, sides * 2, strict=True))


def normalise(pixels, mean: tuple, std: tuple):
    """uint8 `(B, H, W, 3)` to float32 of zero mean and unit deviation; `mean`, `std` per channel in [0, 1]."""
    return (pixels.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)
