"""What readers hand to tasks: images, captions, and what belongs to what. I images, C captions."""

import dataclasses
import io
from pathlib import Path

import numpy as np
from PIL import Image

from mefn_jax.data.images import to_rgb
from mefn_jax.data.split import Split
from mefn_jax.errors import DataError, reason

# Rows of the table of compositional cases beside those of the subsets.
ALL_CASES, MEAN_OF_SUBSETS, SAME_WORDS = "all", "mean", "same words"
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


class ImageRecords:
    """Records of image files, in the form that `Split` needs, without captions. An image may be a part of its file, cut
    out at a box."""

    def __init__(self, paths: list[Path], boxes: list[Box | None], names: list[str]):
        self.paths, self.boxes, self.names = paths, boxes, names

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row: int) -> dict:
        """Returns a record. Raises DataError if the file cannot be read, or has no pixel in the box."""
        try:
            data = self.paths[row].read_bytes()
        except OSError as e:
            raise DataError(f"{self.paths[row]}: {e.strerror or e}") from None
        box = self.boxes[row]
        return {
            "image": data if box is None else crop_image(data, box, self.names[row]),
            "captions": [],
            "image_id": self.names[row],
            "scene": None,
        }


def list_image_names(images: Split) -> list[str]:
    """Returns the names of images, without reading their files where the names are known."""
    if isinstance(images.records, ImageRecords):
        return images.records.names
    return [images.record(k)["image_id"] for k in range(images.num_images)]


def crop_image(data: bytes, box: Box, name: str) -> bytes:
    """Returns the part of an image inside a box as a PNG file. Raises DataError if it has no pixel, or if the image
    cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            box = tuple(np.clip(box, 0, (*image.size, *image.size)).tolist())
            if box[0] >= box[2] or box[1] >= box[3]:
                raise ValueError(f"the box {box} is empty")
            out = io.BytesIO()
            to_rgb(image).crop(box).save(out, "PNG", compress_level=1)
    except Exception as e:  # for damaged files, Pillow raises errors of any class
        raise DataError(f"image {name!r}: cannot be cropped ({reason(e)}); replace it") from None
    return out.getvalue()


class ImagePool:
    """Images of a benchmark, each of them once, by position."""

    def __init__(self):
        self._positions, self._paths, self._boxes, self._names = {}, [], [], []

    def add(self, path: Path, name: str, box: Box | None = None) -> int:
        """Adds an image unless it is there, and returns its position."""
        key = (path, box)
        if key not in self._positions:
            self._positions[key] = len(self._paths)
            self._paths.append(path)
            self._boxes.append(box)
            self._names.append(name)
        return self._positions[key]

    def to_split(self, name: str) -> Split:
        """Returns the images as a split without captions."""
        records = ImageRecords(self._paths, self._boxes, self._names)
        return Split(name, records, np.arange(len(records)), np.zeros(len(records) + 1, np.int64))


class CaptionPool:
    """Captions of a benchmark, each of them once, by position, in the order in which they were added."""

    def __init__(self):
        self._positions = {}

    def add(self, text: str) -> int:
        """Adds a caption unless it is there, and returns its position."""
        return self._positions.setdefault(text, len(self._positions))

    def to_list(self) -> list[str]:
        """Returns the captions as a list, by position."""
        return list(self._positions)


@dataclasses.dataclass(frozen=True)
class Choice:
    """An image, captions that are true of it, and captions that are not. A success: every true caption scores higher
    than every untrue one."""

    image: int
    true: tuple[int, ...]
    false: tuple[int, ...]
    subset: str


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Two images and two captions: caption k is true of image k alone."""

    images: tuple[int, int]
    captions: tuple[int, int]
    subset: str


@dataclasses.dataclass(frozen=True)
class Cases:
    """A compositional benchmark: cases of one kind, on images and captions by position."""

    images: Split
    captions: list[str]
    cases: list[Choice] | list[Pairing]


@dataclasses.dataclass(frozen=True)
class RatedPairs:
    """Human judgements of P pairs.

    Attributes:
        images: the images.
        captions: the captions.
        image, caption: int64 `(P,)`, the image and the caption of each pair.
        ratings: float64 `(P, J)`, the judgements of each pair; NaN where it has fewer.
        skipped: pairs that are left out because the caption is one of the image's own.
    """

    images: Split
    captions: list[str]
    image: np.ndarray
    caption: np.ndarray
    ratings: np.ndarray
    skipped: int = 0


@dataclasses.dataclass(frozen=True)
class LanguageTable:
    """Captions of the same images in several languages: `{code: (captions, caption_image int64 (C,))}`, in the order of
    the images."""

    images: Split
    languages: dict[str, tuple[list[str], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class ClassFolder:
    """Images of K classes.

    Attributes:
        images: the images.
        label: int64 `(I,)`, the class of each image.
        names: the K names of the classes, as prompts write them.
        templates: T prompts with `{}` in place of the name.
    """

    images: Split
    label: np.ndarray
    names: list[str]
    templates: list[str]
