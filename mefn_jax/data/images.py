"""JPEG bytes to a square array: decode, resize, crop or squash. Normalisation happens on the device (`normalise`)."""

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
BLUR_REACHES = 5**0.5  # the reduction up to which `_bilinear` blurs enough
RESIZE_MODES = ("crop", "squash")
ORIENTATION = 0x0112  # EXIF


@functools.cache
def _use_one_thread_per_image() -> None:
    cv2.setNumThreads(1)  # images are decoded side by side already


@dataclasses.dataclass(frozen=True)
class Resize:
    """How an image becomes a square.

    Attributes:
        size: pixels of its side.
        mode: "crop" scales the shorter side to `size / crop` pixels and cuts the centre square out; "squash" scales both
            sides to `size`, whatever the image's shape.
        crop: the share of the shorter side that is kept.
        resample: a name of RESAMPLE.
    """

    size: int
    mode: str = "crop"
    crop: float = 1.0
    resample: str = "bilinear"


def resize_from_config(image) -> Resize:
    """What `config.image` says of resizing."""
    return Resize(image.size, image.resize, image.crop, image.resample)


def decode(
    data: bytes,
    resize: Resize,
    name: str,
    augment: Augment | None = None,
    rng: np.random.Generator | None = None,
    may_flip: bool = True,
) -> np.ndarray:
    """Decodes, turns upright as its EXIF says, and resizes: uint8 `(size, size, 3)`, RGB.

    With `augment` (which needs `rng`) a random box takes the place of `resize.mode` if `augment.crop` is under 1, and
    flip and colours follow; `may_flip=False` forbids the flip ("left of" would become wrong) and changes no other draw.
    Raises DataError naming the image (`name`) if it is not a complete image, or one of absurd size.
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
    """An encoded image whose `sides`, (width, height) once upright, are known before its pixels are decoded. Raises
    what Pillow does, or ValueError if there are too many pixels."""

    def __init__(self, data: bytes):
        self.data = data
        self.sides = _plain_jpeg_size(data)
        self.plain = self.sides is not None
        if not self.plain:
            with self._pillow() as image:
                # Orientations from 5 on lie on their side.
                self.sides = image.size[::-1] if image.getexif().get(ORIENTATION, 1) >= 5 else image.size

    def pixels(self, reduction: int) -> np.ndarray:
        """uint8 `(ceil(height / reduction), ceil(width / reduction), 3)`, RGB; where the format has no decoding at a
        reduced scale, `(height, width, 3)`."""
        width, height = (-(-side // reduction) for side in self.sides)
        if self.plain:
            with contextlib.suppress(ValueError):  # on the least fault: Pillow says which ones matter
                return simplejpeg.decode_jpeg(self.data, min_width=width, min_height=height)
        with self._pillow() as image:
            image.draft("RGB", tuple(side // reduction for side in image.size))  # Pillow rounds up itself
            return np.asarray(to_rgb(ImageOps.exif_transpose(image)))

    def _pillow(self) -> Image.Image:
        image = Image.open(io.BytesIO(self.data))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}")
        return image


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a colour or grey JPEG that is upright and of no absurd size, which libjpeg-turbo alone can
    decode, faster than through Pillow (2.8 times at full size); None of anything else."""
    metadata = _metadata(data)
    if not metadata or b"Exif" in metadata or b"tiff:Orientation" in metadata:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    plain = colours in ("YCbCr", "Gray") and width * height <= Image.MAX_IMAGE_PIXELS
    return (width, height) if plain else None


def _metadata(data: bytes) -> bytes:
    """A JPEG's bytes up to the coded pixels; nothing if it is no JPEG. Looking through all of it takes too long."""
    if data[:2] != b"\xff\xd8":
        return b""
    end = 2
    while data[end : end + 1] == b"\xff" and data[end + 1 : end + 2] != b"\xda":  # start of scan
        end += 2 + int.from_bytes(data[end + 2 : end + 4])
    return data[:end]


def _reduction(sides: tuple[int, int], least: int) -> int:
    """The largest of 8, 4, 2, 1 by which `sides` can be divided and stay at least `least`. libjpeg can decode at any
    eighth, but has vector instructions for these only: at 5/8 it takes longer than at full size."""
    return next((k for k in (8, 4, 2) if min(sides) // k >= least), 1)


def _resize_whole(source: _Source, resize: Resize) -> np.ndarray:
    """The image, or the centre of it, as `resize` says."""
    shorter = round(resize.size / resize.crop)
    image = Image.fromarray(source.pixels(_reduction(source.sides, shorter)))
    box = (0, 0, *image.size) if resize.mode == "squash" else _centre(image.size, shorter, resize.size)
    return np.asarray(image.resize((resize.size,) * 2, RESAMPLE[resize.resample], box=box, reducing_gap=2.0))


def _resize_box(source: _Source, box: tuple[int, int, int, int], resize: Resize) -> np.ndarray:
    """The box, in pixels of the image, scaled to a square."""
    width, height = box[2] - box[0], box[3] - box[1]
    pixels = source.pixels(_reduction((width, height), resize.size))
    # At a reduced scale the box is rounded to whole pixels, of which it has at least as many as the output: a shift of
    # half a pixel at most.
    scales = [now / then for now, then in zip(pixels.shape[1::-1], source.sides, strict=True)] * 2
    left, top, right, bottom = (round(side * scale) for side, scale in zip(box, scales, strict=True))
    pixels = pixels[top:bottom, left:right]
    if resize.resample == "bilinear" and max(pixels.shape[:2]) <= BLUR_REACHES * resize.size:
        return _bilinear(pixels, resize.size)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((resize.size,) * 2, RESAMPLE[resize.resample], reducing_gap=2.0))


def _bilinear(pixels: np.ndarray, size: int) -> np.ndarray:
    """Pillow's bilinear resizing (a triangle as wide as the reduction), nearly, in a quarter of its time: uint8
    `(H, W, 3)`, H and W at most BLUR_REACHES times `size`, to `(size, size, 3)`.

    OpenCV's triangle is always one pixel wide, which at a reduction s aliases. A blur (a, 1 - 2a, a) with
    a = (s^2 - 1) / 12 before it gives the variance of Pillow's triangle, at s = 2 the same weights, and beyond
    s = 5^(1/2), where a = 1/3, it can give no more.
    """
    down, across = ((max(side / size, 1) ** 2 - 1) / 12 for side in pixels.shape[:2])
    if max(down, across) > 0:
        kernels = (np.array([a, 1 - 2 * a, a]) for a in (across, down))
        pixels = cv2.sepFilter2D(pixels, -1, *kernels, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB, whatever its mode."""
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


def normalize_pixels(pixels, mean: tuple, std: tuple):
    """uint8 `(B, H, W, 3)` to float32 of zero mean and unit deviation; `mean`, `std` per channel in [0, 1]."""
    return (pixels.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)
