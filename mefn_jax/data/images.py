"""From the bytes of an image file to a square array: decoding, cropping or squashing, resizing.

Normalization happens on the device (`normalize_pixels`).
"""

import contextlib
import dataclasses
import functools
import io
import math

import cv2
import jax.numpy as jnp
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from mefn_jax.data.augment import Augment, apply_color_jitter, draw_color_factors, draw_crop_box, draw_flip
from mefn_jax.errors import DataError, reason

RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
BLUR_REACHES = 5**0.5  # largest reduction for which the blur of `_resize_bilinear` suffices
RESIZE_MODES = ("crop", "squash", "squash_crop")
MAX_RESIZED_PIXELS = 2**24  # of a whole image that is resized to be cropped
START_OF_JPEG, START_OF_SCAN = b"\xff\xd8", b"\xda"
ORIENTATION = 0x0112  # EXIF tag
TRANSPOSES = {  # what turns an image of each orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)  # orientations whose width and height are exchanged
MIRRORS = (2, 3, 6, 7), (3, 4, 7, 8)  # orientations whose last column, or last row, comes to the left, or to the top


@functools.cache
def _use_one_thread_per_image() -> None:
    cv2.setNumThreads(1)  # several images are decoded in parallel already


@dataclasses.dataclass(frozen=True)
class Resize:
    """Options of resizing an image to a square.

    Attributes:
        size: side of the square, in pixels.
        mode: "crop" scales the shorter side to `size / crop` pixels and cuts out the center square; "squash" scales
            both sides to `size`, whatever the image's shape; "squash_crop" scales both sides to `size / crop` and cuts
            out the center square.
        crop: fraction of the (shorter) side that is kept, except by "squash".
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
    may_reduce: bool = False,
) -> np.ndarray:
    """Decodes an image, turns it upright by its EXIF orientation, and resizes it: uint8 `(size, size, 3)`, RGB.

    The pixels are those of Pillow's resizing of the whole image, then cropped. With `may_reduce`, a JPEG may be decoded
    at 1/2, 1/4 or 1/8 of its scale first, which is faster and gives slightly different pixels. With `augment` (which
    needs `rng`), a random box replaces `resize.mode` if `augment.crop` is below 1, always in the faster way; flip and
    color jitter follow. `may_flip=False` forbids the flip, which would make captions with "left" wrong, and changes no
    other draw. Metadata that cannot be read are ignored. Raises DataError that names the image (`name`) if it is
    incomplete, no image, or larger than Pillow's limit.
    """
    _use_one_thread_per_image()
    with _decoding_errors(name):
        source = _Source(data)
    box, flip, factors = None, False, None
    if augment is not None:
        flip, factors = draw_flip(rng, augment.flip), draw_color_factors(rng, augment.color_jitter)
        box = draw_crop_box(rng, source.sides, augment.crop) if augment.crop < 1 else None
    with _decoding_errors(name):
        if box:
            pixels = _resize_box(source, box, resize)
        else:
            pixels = _resize_reduced(source, resize) if may_reduce else _resize_whole(source, resize)
    pixels = cv2.flip(pixels, 1) if flip and may_flip else pixels
    return apply_color_jitter(pixels, factors) if augment and augment.color_jitter else pixels


@contextlib.contextmanager
def _decoding_errors(name: str):
    """Raises DataError, naming the image, for any error in the body."""
    try:
        yield
    except Exception as e:  # for damaged files, Pillow raises errors of any class
        raise DataError(
            f"image {name!r} cannot be decoded ({reason(e)}); replace it, or set data.skip_undecodable=True"
        ) from None


class _Source:
    """Encoded image whose `sides` (width, height, once upright) are known before a JPEG's pixels are decoded.

    Raises the errors of Pillow, and ValueError if the image has too many pixels.
    """

    def __init__(self, data: bytes):
        self.data = data
        self.sides = _read_plain_jpeg_size(data)
        self.is_plain_jpeg = self.sides is not None
        if not self.is_plain_jpeg:
            self._open()
            self.sides = self._image.size[::-1] if self._orientation in SWAPS_SIDES else self._image.size

    def decode(self, reduction: int = 1) -> tuple[np.ndarray, "_Scale"]:
        """Decodes at a reduced scale: uint8 `(ceil(height / reduction), ceil(width / reduction), 3)`, RGB, and the
        scale. Formats that cannot be decoded at a reduced scale give `(height, width, 3)`."""
        if self.is_plain_jpeg:
            width, height = (-(-side // reduction) for side in self.sides)
            # An error is raised for the least fault; Pillow then decides which ones matter.
            with contextlib.suppress(Exception):
                return simplejpeg.decode_jpeg(self.data, min_width=width, min_height=height), _Scale(reduction)
            self._open()
        image = self._image
        if reduction > 1 and not image.draft("RGB", tuple(side // reduction for side in image.size)):
            reduction = 1
        if self._orientation in TRANSPOSES:
            image = image.transpose(TRANSPOSES[self._orientation])
        padding = (-side % reduction for side in self.sides)
        starts = (p if self._orientation in mirrors else 0 for p, mirrors in zip(padding, MIRRORS, strict=True))
        return np.asarray(to_rgb(image)), _Scale(reduction, tuple(starts))

    def _open(self) -> None:
        """Opens the image with Pillow, as `_image`, and reads its `_orientation`."""
        image = _open_with_pillow(self.data)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}")
        if image.format not in ("JPEG", "MPO"):
            image.load()  # turns TIFF upright, and reads metadata that follow the pixels (PNG)
        self._image, self._orientation = image, _read_orientation(image)


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Relation of decoded pixels to those of the image.

    Attributes:
        reduction: factor by which the decoded sides are shorter than the image's; they are rounded up.
        starts: number of image pixels by which rounding up has extended the left and the top side. It is 0 unless the
            image was turned upright; otherwise the right and the bottom side are extended.
    """

    reduction: int = 1
    starts: tuple[int, int] = (0, 0)

    def to_decoded(self, box: tuple) -> tuple:
        """Returns a box (left, top, right, bottom), given in pixels of the image, in those of the decoded one."""
        return tuple((corner + start) / self.reduction for corner, start in zip(box, self.starts * 2, strict=True))


def _open_with_pillow(data: bytes) -> Image.Image:
    """Opens an image with Pillow; a JPEG with damaged metadata, which Pillow may refuse, without them."""
    try:
        try:
            return Image.open(io.BytesIO(data))
        except Exception:
            if data[:2] != START_OF_JPEG:
                raise
            return Image.open(io.BytesIO(_remove_metadata(data)))
    except UnidentifiedImageError:  # its message has no more than an address in memory
        raise ValueError("no format that Pillow reads") from None


def _read_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, from 1 to 8; 1, upright, if the metadata have none or cannot be read."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
        return int(orientation) if orientation in TRANSPOSES else 1
    except Exception:  # damaged metadata raise errors of any class
        return 1


def _read_plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns width and height of a JPEG that libjpeg-turbo can decode without Pillow, None for any other file.

    Such a JPEG is in color or gray, has no orientation, and is not larger than Pillow's limit. Decoding it without
    Pillow is faster, 2.8 times at full size.
    """
    segments = _find_segments(data)
    metadata = data[: segments[-1][1]] if segments else b""
    if not metadata or b"Exif" in metadata or b"tiff:Orientation" in metadata:
        return None
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:  # Pillow then says what is wrong
        return None
    is_plain = color_space in ("YCbCr", "Gray") and width * height <= Image.MAX_IMAGE_PIXELS
    return (width, height) if is_plain else None


def _find_segments(data: bytes) -> list[tuple[int, int]]:
    """Returns start and end of each segment of a JPEG before the coded pixels, empty if it is no JPEG or not made of
    segments alone."""
    segments, start = [], 2
    while data[:2] == START_OF_JPEG and data[start : start + 1] == b"\xff" and data[start + 1 : start + 2] > b"\xbf":
        if data[start + 1 : start + 2] == START_OF_SCAN:
            return segments
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        segments.append((start, end))
        start = end
    return []


def _remove_metadata(data: bytes) -> bytes:
    """Returns a JPEG without its segments of applications, except for those that say how colors are coded."""
    segments = _find_segments(data)
    kept = [(a, b) for a, b in segments if not 0xE1 <= data[a + 1] <= 0xED]
    return b"".join([data[:2], *(data[a:b] for a, b in kept), data[segments[-1][1] if segments else 2 :]])


def _choose_reduction(sides: tuple[int, int], min_side: int) -> int:
    """Returns the largest of 8, 4, 2 and 1 by which `sides` can be divided without falling below `min_side`.

    libjpeg can decode at any multiple of 1/8, but has vector instructions for these scales only: decoding at 5/8 takes
    longer than at full size.
    """
    return next((k for k in (8, 4, 2) if min(sides) // k >= min_side), 1)


def _resize_whole(source: _Source, resize: Resize) -> np.ndarray:
    """Resizes the whole image, then cuts out its center square unless `squash`: uint8 `(size, size, 3)`.

    Pillow clips between its two passes, and their order follows from the sizes. A resize of the crop's box alone would
    therefore give other pixels, by up to 25 of 255.
    """
    image = Image.fromarray(source.decode()[0])
    size, resample = resize.size, RESAMPLE[resize.resample]
    if resize.mode == "squash":
        return np.asarray(image.resize((size, size), resample))
    (width, height), (left, top) = _place_center(source.sides, resize)
    if width * height > MAX_RESIZED_PIXELS:  # a strip, most of which is cut off
        return np.asarray(image.resize((size, size), resample, box=_compute_center_box(source.sides, resize)))
    return np.asarray(image.resize((width, height), resample).crop((left, top, left + size, top + size)))


def _resize_reduced(source: _Source, resize: Resize) -> np.ndarray:
    """Resizes as `_resize_whole` does, but decodes and averages at a reduced scale first if the image is large."""
    pixels, scale = source.decode(_choose_reduction(source.sides, _shorter_side(resize)))
    box = (0, 0, *source.sides) if resize.mode == "squash" else _compute_center_box(source.sides, resize)
    return _resize_with_gap(pixels, scale.to_decoded(box), resize)


def _resize_box(source: _Source, box: tuple[int, int, int, int], resize: Resize) -> np.ndarray:
    """Resizes a box, given in pixels of the image, to uint8 `(size, size, 3)`. For a large box, the image is decoded at
    a reduced scale."""
    sides = box[2] - box[0], box[3] - box[1]
    pixels, scale = source.decode(_choose_reduction(sides, resize.size))
    left, top, right, bottom = scale.to_decoded(box)
    # Pixels outside the box are cut off. At a reduced scale, part of a border pixel lies outside.
    first_column, first_row = math.floor(left), math.floor(top)
    pixels = pixels[first_row : math.ceil(bottom), first_column : math.ceil(right)]
    box = (left - first_column, top - first_row, right - first_column, bottom - first_row)
    if resize.resample == "bilinear" and max(sides) <= BLUR_REACHES * resize.size * scale.reduction:
        return _resize_bilinear(pixels, box, resize.size)
    return _resize_with_gap(np.ascontiguousarray(pixels), box, resize)


def _resize_with_gap(pixels: np.ndarray, box: tuple, resize: Resize) -> np.ndarray:
    """Resizes a box of pixels with Pillow, which averages whole pixels first if there are many."""
    size, resample = (resize.size,) * 2, RESAMPLE[resize.resample]
    return np.asarray(Image.fromarray(pixels).resize(size, resample, box=box, reducing_gap=2.0))


def _resize_bilinear(pixels: np.ndarray, box: tuple, size: int) -> np.ndarray:
    """Resizes a box of uint8 `(H, W, 3)` to `(size, size, 3)` almost like Pillow's bilinear filter, in a quarter of its
    time.

    The box covers at least a part of every row and column, and its sides are at most BLUR_REACHES times `size`.
    Pillow's filter is a triangle as wide as the reduction s. OpenCV's triangle is always one pixel wide, which aliases.
    A blur with the weights (a, 1 - 2a, a), a = (s^2 - 1) / 12, before it gives the filter the variance of Pillow's
    triangle, and at s = 2 the same weights. At s = 5^(1/2), where a = 1/3, the blur is as wide as it can be.
    """
    left, top, right, bottom = box
    scale_x, scale_y = (right - left) / size, (bottom - top) / size
    blur_x, blur_y = ((max(scale, 1) ** 2 - 1) / 12 for scale in (scale_x, scale_y))
    if max(blur_y, blur_x) > 0:
        kernels = (np.array([a, 1 - 2 * a, a]) for a in (blur_x, blur_y))
        pixels = cv2.sepFilter2D(pixels, -1, *kernels, borderType=cv2.BORDER_REPLICATE)
    if box == (0, 0, pixels.shape[1], pixels.shape[0]):
        return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)
    # From the center of each output pixel to its place in `pixels`, both counted from the center of the first one.
    place = np.array([[scale_x, 0, left + (scale_x - 1) / 2], [0, scale_y, top + (scale_y - 1) / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, place, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB. Transparent parts become white, as in CLIP's processor of transformers."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _shorter_side(resize: Resize) -> int:
    """Returns the length to which the shorter side is resized."""
    return round(resize.size / resize.crop)


def _place_center(sides: tuple[int, int], resize: Resize) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the sides (width, height) to which an image of `sides` is resized, and the left top corner of its center
    square there. The longer side is rounded down, as in Hugging Face and torchvision."""
    shorter = _shorter_side(resize)
    width, height = (shorter if resize.mode == "squash_crop" else side * shorter // min(sides) for side in sides)
    return (width, height), ((width - resize.size) // 2, (height - resize.size) // 2)


def _compute_center_box(sides: tuple[int, int], resize: Resize) -> tuple:
    """Returns the box, in pixels of an image of `sides` (width, height), that becomes the center square."""
    resized, corner = _place_center(sides, resize)
    corners = (*corner, *(start + resize.size for start in corner))
    return tuple(c / length * side for c, length, side in zip(corners, resized * 2, sides * 2, strict=True))


def normalize_pixels(pixels, mean: tuple, std: tuple):
    """Normalizes uint8 `(B, H, W, 3)` to float32 by `mean` and `std` of each channel, in units of [0, 1]."""
    return (pixels.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)
