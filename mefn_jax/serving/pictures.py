"""Pictures for the page: checked before they are decoded, and always encoded anew, so that a browser never gets a file
as it lies on the disk or as somebody has sent it."""

import dataclasses
import io
import warnings

import numpy as np
from PIL import Image

from mefn_jax.data import images
from mefn_jax.errors import DataError
from mefn_jax.reports import pages
from mefn_jax.retrieval.image_folder import SNIFFED_FORMATS
from mefn_jax.serving.limits import MAX_IMAGE_BYTES

PICTURE_PIXELS = 176  # side of a picture among results
JPEG_QUALITY = 88


def check_image(data: bytes, name: str) -> bytes:
    """Returns the bytes of an image file. Raises DataError if it is too large, or none of SNIFFED_FORMATS: Pillow has
    readers that call other programs, which nothing that was sent may reach."""
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"{name}: {len(data)} bytes; at most {MAX_IMAGE_BYTES} are read")
    Image.init()
    formats = [name for name in SNIFFED_FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=formats) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            pixels = image.width * image.height
    except Exception:  # Pillow raises errors of any class for damaged files
        raise DataError(f"{name}: is no image that can be read") from None
    if pixels > Image.MAX_IMAGE_PIXELS:
        raise DataError(f"{name}: {pixels} pixels; at most {Image.MAX_IMAGE_PIXELS} are read")
    return data


def make_thumbnail(data: bytes, resize: images.Resize, name: str, pixels: int = PICTURE_PIXELS) -> bytes:
    """Returns a JPEG of an image, resized and cropped as the model sees it, but with this side. Raises DataError."""
    own_size = dataclasses.replace(resize, size=pixels, resample="bicubic")
    return encode_jpeg(images.decode(check_image(data, name), own_size, name, may_reduce=True))


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """Returns pixels uint8 `(H, W, 3)` as a JPEG file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def photo_uri(photo: np.ndarray | None) -> str | None:
    """Returns the photograph of an explanation as a data URI; None without one."""
    return None if photo is None else pages.data_uri("jpeg", encode_jpeg(photo))
