"""Images that a served model searches: those of an index, or those of a split of the run's own data."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path, PurePath

import numpy as np

from mefn_jax.config import require_local
from mefn_jax.data.split import Split
from mefn_jax.errors import DataError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.evaluation.gallery import open_split
from mefn_jax.evaluation.run import Gallery
from mefn_jax.retrieval.index import Index, open_index
from mefn_jax.serving.limits import MAX_IMAGE_BYTES

MAX_LINES = 5000  # captions of a split that are ranked for an image


@dataclasses.dataclass(frozen=True)
class SearchedImages:
    """I images with their vectors, and how the file of one is read.

    Attributes:
        index: names, vectors and Features, in memory or mapped.
        source: where they are from, in a few words.
        captions: captions of these images, if they are known.
        read: `read(position)` returns the bytes of an image file; it raises DataError. None for precomputed regions.
    """

    index: Index
    source: str
    captions: list[str]
    read: Callable[[int], bytes] | None

    @property
    def number(self) -> int:
        """Returns the number of images that can be found."""
        return int(self.index.readable.sum())


def open_indexed_images(path: str, checkpoint_id: dict) -> SearchedImages:
    """Opens an index of a checkpoint. Raises ConfigError and DataError as `open_index` does."""
    require_local("--index", path)
    index = open_index(path, checkpoint_id)

    def read(position: int) -> bytes:
        return read_inside(index.folder, index.names[position])

    return SearchedImages(index, f"index {path}", [], read)


def read_inside(folder: Path, name: str) -> bytes:
    """Returns the bytes of the image `name` of a folder. Raises DataError if the name leads out of it, which no name of
    `eval.py index` does, or if the file cannot be read or is too large."""
    pure = PurePath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise DataError(f"{name!r}: is not below the folder of the index")
    try:
        with open(folder / pure, "rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)
    except OSError as e:
        raise DataError(f"{name!r}: cannot be read any more ({e.strerror})") from None


def encode_split(evaluator: Evaluator, params, gallery: Gallery) -> SearchedImages:
    """Encodes the images of a split, and keeps them in memory. Raises DataError and ConfigError as an evaluation
    does."""
    split = open_split(evaluator, gallery).split
    features = evaluator.encode_images(params, split)
    names = [image_id for image_id, _ in split.ids_and_captions]
    vectors = evaluator.image_vectors(params, features)
    readable = np.ones(len(names), bool)
    index = Index(Path(), names, readable, vectors, features.pooled, features.fragments, features.mask)
    read = None if split.region_width else lambda position: split.record(position)["image"]
    return SearchedImages(index, f"split {split.name}", list_captions(split), read)


def list_captions(split: Split) -> list[str]:
    """Returns the first MAX_LINES different captions of a split."""
    captions = (caption for _, captions in split.ids_and_captions for caption in captions)
    return list(itertools.islice(dict.fromkeys(captions), MAX_LINES))
