"""From the bytes of an image file to a square array: decoding, cropping or squashing, resizing.

Normalization happens on the device (`normalize_pixels`).
"""

import contextlib
import dataclasses
import functools
import io

import cv2
import jax.numpy as jnp
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from mefn_jax.data.augment import Augment, apply_color_jitter, draw_color_factors, draw_crop_box, draw_flip
from mefn_jax.errors import DataError

RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
BLUR_REACHES = 5**0.5  # largest reduction for which the blur of `_resize_bilinear` suffices
RESIZE_MODES = ("crop", "squash")
ORIENTATION = 0x0112  # EXIF tag


@functools.cache
def _use_one_thread_per_image() -> None:
    cv2.setNumThreads(1)  # several images are decoded in parallel already


@dataclasses.dataclass(frozen=True)
class Resize:
    """Options of resizing an image to a square.

    Attributes:
        size: side of the square, in pixels.
        mode: "crop" scales the shorter side to `size / crop` pixels and cuts out the center square; "squash" scales
            both sides to `size`, whatever the image's shape.
        crop: fraction of the shorter side that is kept.
        resample: a name of RESAMPLE.
    """

    size: int
    mode: str = "crop"
    crop: float = 1.0
    resample: str = "bilinear"


def resize_from_config(image) -> Resize:
    """Returns the Resize of the options `config.image`."""
    return Resize(image.size, image.resize, image.crop, image.resample)


def decode(
    data: bytes,
    resize: Resize,
    name: str,
    augment: Augment | None = None,
    rng: np.random.Generator | None = None,
    may_flip: bool = True,
) -> np.ndarray:
    """Decodes an image, turns it upright by its EXIF orientation, and resizes it: uint8 `(size, size, 3)`, RGB.

    With `augment` (which needs `rng`), a random box replaces `resize.mode` if `augment.crop` is below 1; flip and color
    jitter follow. `may_flip=False` forbids the flip, which would make captions with "left" wrong, and changes no other
    draw. Raises DataError that names the image (`name`) if it is incomplete, no image, or larger than Pillow's limit.
    """
    _use_one_thread_per_image()
    try:
        source = _Source(data)
        if augment is None:
            return _resize_whole(source, resize)
        flip, factors = draw_flip(rng, augment.flip), draw_color_factors(rng, augment.color_jitter)
        box = draw_crop_box(rng, source.sides, augment.crop)
        pixels = _resize_box(source, box, resize) if augment.crop < 1 else _resize_whole(source, resize)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise DataError(
            f"image {name!r} cannot be decoded ({e}); replace it, or set data.skip_undecodable=True"
        ) from None
    pixels = cv2.flip(pixels, 1) if flip and may_flip else pixels
    return apply_color_jitter(pixels, factors) if augment.color_jitter else pixels


class _Source:
    """Encoded image whose `sides` (width, height, once upright) are known before its pixels are decoded.

    Raises the errors of Pillow, and ValueError if the image has too many pixels.
    """

    def __init__(self, data: bytes):
        self.data = data
        self.sides = _read_plain_jpeg_size(data)
        self.is_plain_jpeg = self.sides is not None
        if not self.is_plain_jpeg:
            with self._pillow() as image:
                # Orientations from 5 on swap width and height.
                self.sides = image.size[::-1] if image.getexif().get(ORIENTATION, 1) >= 5 else image.size

    def pixels(self, reduction: int) -> np.ndarray:
        """Decodes at a reduced scale: uint8 `(ceil(height / reduction), ceil(width / reduction), 3)`, RGB. Formats that
        cannot be decoded at a reduced scale give `(height, width, 3)`."""
        width, height = (-(-side // reduction) for side in self.sides)
        if self.is_plain_jpeg:
            with contextlib.suppress(ValueError):  # raised for the least fault; Pillow then decides which ones matter
                return simplejpeg.decode_jpeg(self.data, min_width=width, min_height=height)
        with self._pillow() as image:
            image.draft("RGB", tuple(side // reduction for side in image.size))  # Pillow rounds up itself
            return np.asarray(to_rgb(ImageOps.exif_transpose(image)))

    def _pillow(self) -> Image.Image:
        """Opens the image with Pillow. Raises ValueError if it has too many pixels."""
        image = Image.open(io.BytesIO(self.data))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}")
        return image


def _read_plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns width and height of a JPEG that libjpeg-turbo can decode without Pillow, None for any other file.

    Such a JPEG is in color or gray, has no orientation, and is not larger than Pillow's limit. Decoding it without
    Pillow is faster, 2.8 times at full size.
    """
    metadata = _read_metadata(data)
    if not metadata or b"Exif" in metadata or b"tiff:Orientation" in metadata:
        return None
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    is_plain = color_space in ("YCbCr", "Gray") and width * height <= Image.MAX_IMAGE_PIXELS
    return (width, height) if is_plain else None


def _read_metadata(data: bytes) -> bytes:
    """Returns a JPEG's bytes before the coded pixels, empty if it is no JPEG. A search through all bytes would take too
    long."""
    if data[:2] != b"\xff\xd8":
        return b""
    end = 2
    while data[end : end + 1] == b"\xff" and data[end + 1 : end + 2] != b"\xda":  # start of scan
        end += 2 + int.from_bytes(data[end + 2 : end + 4])
    return data[:end]


def _choose_reduction(sides: tuple[int, int], min_side: int) -> int:
    """Returns the largest of 8, 4, 2 and 1 by which `sides` can be divided without falling below `min_side`.

    libjpeg can decode at any multiple of 1/8, but has vector instructions for these scales only: decoding at 5/8 takes
    longer than at full size.
    """
    return next((k for k in (8, 4, 2) if min(sides) // k >= min_side), 1)


def _resize_whole(source: _Source, resize: Resize) -> np.ndarray:
    """Resizes the whole image (`squash`) or its center square (`crop`) to uint8 `(size, size, 3)`."""
    shorter = round(resize.size / resize.crop)
    image = Image.fromarray(source.pixels(_choose_reduction(source.sides, shorter)))
    box = (0, 0, *image.size) if resize.mode == "squash" else _compute_center_box(image.size, shorter, resize.size)
    return np.asarray(image.resize((resize.size,) * 2, RESAMPLE[resize.resample], box=box, reducing_gap=2.0))


def _resize_box(source: _Source, box: tuple[int, int, int, int], resize: Resize) -> np.ndarray:
    """Resizes a box, in pixels of the image, to uint8 `(size, size, 3)`."""
    width, height = box[2] - box[0], box[3] - box[1]
    pixels = source.pixels(_choose_reduction((width, height), resize.size))
    # At a reduced scale the box is rounded to whole pixels. It has at least as many pixels as the output, so that its
    # borders shift by at most half a pixel of the output.
    scales = [decoded_side / side for decoded_side, side in zip(pixels.shape[1::-1], source.sides, strict=True)] * 2
    left, top, right, bottom = (round(corner * scale) for corner, scale in zip(box, scales, strict=True))
    pixels = pixels[top:bottom, left:right]
    if resize.resample == "bilinear" and max(pixels.shape[:2]) <= BLUR_REACHES * resize.size:
        return _resize_bilinear(pixels, resize.size)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((resize.size,) * 2, RESAMPLE[resize.resample], reducing_gap=2.0))


def _resize_bilinear(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 `(H, W, 3)` to `(size, size, 3)` almost like Pillow's bilinear filter, in a quarter of its time.

    H and W are at most BLUR_REACHES times `size`. Pillow's filter is a triangle as wide as the reduction s. OpenCV's
    triangle is always one pixel wide, which aliases. A blur with the weights (a, 1 - 2a, a), a = (s^2 - 1) / 12, before
    it gives the filter the variance of Pillow's triangle, and at s = 2 the same weights. At s = 5^(1/2), where a = 1/3,
    the blur is as wide as it can be.
    """
    blur_y, blur_x = ((max(side / size, 1) ** 2 - 1) / 12 for side in pixels.shape[:2])
    if max(blur_y, blur_x) > 0:
        kernels = (np.array([a, 1 - 2 * a, a]) for a in (blur_x, blur_y))
        pixels = cv2.sepFilter2D(pixels, -1, *kernels, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _compute_center_box(sides: tuple[int, int], shorter: int, size: int) -> tuple:
    """Returns the box, in pixels of an image of `sides` (width, height), that becomes the center square of `size`
    pixels when the shorter side is resized to `shorter`. The longer side is rounded down, as in Hugging Face and
    torchvision."""
    width, height = (side * shorter // min(sides) for side in sides)
    left, top = (width - size) // 2, (height - size) // 2
    # Resizing directly from the box of the crop reads only the pixels that are kept.
    box = (left / width, top / height, (left + size) / width, (top + size) / height)
    return tuple(b * side for b, side in zip(box, sides * 2, strict=True))


def normalize_pixels(pixels, mean: tuple, std: tuple):
    """Normalizes uint8 `(B, H, W, 3)` to float32 by `mean` and `std` of each channel, in units of [0, 1]."""
    return (pixels.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)
