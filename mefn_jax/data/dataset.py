"""A prepared data set on disk: its splits, images and captions by position, in source order."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from mefn_jax.config import nearest
from mefn_jax.data import images, tokenizer
from mefn_jax.errors import DataError

ALIASES = {"dev": "val"}
HOW = "make one with python -m mefn_jax.data.prepare"


@dataclasses.dataclass
class Split:
    """One split. Image k has captions `first[k] : first[k + 1]` of the split, in source order.

    Attributes:
        name: "train", "val" or "test".
        records: random access to `{image: bytes, captions: [bytes], image_id: bytes, scene: bytes}`.
        rows: int64 `(I,)`, the record of each image (all, unless bad images are left out).
        first: int64 `(I + 1,)`, the number of captions before each image.
        skipped: names of images left out because they cannot be decoded.
    """

    name: str
    records: object
    rows: np.ndarray
    first: np.ndarray
    skipped: list[str]

    @property
    def images(self) -> int:
        """I, how many images the split has."""
        return len(self.rows)

    @property
    def captions(self) -> int:
        """C, how many captions the split has."""
        return int(self.first[-1])

    @functools.cached_property
    def caption_image(self) -> np.ndarray:
        """The image of each caption, int32 `(C,)`."""
        return np.repeat(np.arange(self.images, dtype=np.int32), np.diff(self.first))

    def record(self, image: int) -> dict:
        """`{image: bytes, captions: [str], image_id: str, scene: dict | None}` of an image by its position."""
        raw = self.records[int(self.rows[image])]
        scene = raw["scene"].decode()
        return {
            "image": raw["image"],
            "captions": [c.decode() for c in raw["captions"]],
            "image_id": raw["image_id"].decode(),
            "scene": json.loads(scene) if scene else None,
        }

    def twins(self) -> np.ndarray:
        """Drawn scenes: the position of each image's twin, int64 `(I,)`, -1 for none."""
        twin = np.full(self.images, -1)
        for k in range(self.images):
            scene = self.record(k)["scene"]
            if scene and scene["twin"] and scene["twin"]["index"] < self.images:
                twin[k] = scene["twin"]["index"]
        return twin

    def head(self, number: int) -> "Split":
        """The split's first images alone; all for 0."""
        if not 0 < number < self.images:
            return self
        return dataclasses.replace(self, rows=self.rows[:number], first=self.first[: number + 1])


class Dataset:
    """A directory written by `mefn_jax.data.prepare`."""

    def __init__(self, directory, skip_bad: bool = False):
        """Opens it. Raises DataError if it is missing or not a prepared data set."""
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise DataError(f"data.dir: {directory}: no such directory; {HOW}")
        if not (self.directory / "dataset_info.json").is_file():
            raise DataError(f"data.dir: {directory}: not a prepared data set (no dataset_info.json); {HOW}")
        self.skip_bad = skip_bad
        self.builder = tfds.builder_from_directory(str(self.directory))
        self.facts = dict(self.builder.info.metadata)
        if "caption_counts" not in self.facts:
            raise DataError(f"data.dir: {directory}: not made by this project; {HOW}")

    @property
    def tokenizer_json(self) -> str:
        """The text of the data set's `tokenizer.json`. Raises DataError if it has none."""
        return tokenizer.read_json(self.directory)

    def split(self, name: str) -> Split:
        """The split `name` (`dev` means `val`). Raises DataError naming those present if it is missing."""
        name = ALIASES.get(name, name)
        counts = self.facts["caption_counts"]
        if name not in counts:
            raise DataError(
                f"{self.directory}: no split {name!r}{nearest(name, counts)}; present are {', '.join(counts)}"
            )
        records = self.builder.as_data_source(name, decoders={"image": tfds.decode.SkipDecoding()})
        rows, skipped = np.arange(len(records)), []
        if self.skip_bad:
            bad = _undecodable(records)
            rows, skipped = np.delete(rows, list(bad)), list(bad.values())
        first = np.concatenate([[0], np.cumsum(np.asarray(counts[name])[rows])])
        return Split(name, records, rows, first, skipped)


def _undecodable(records) -> dict[int, str]:
    """Position and name of the images that cannot be decoded; decodes every one."""
    bad = {}
    for k in range(len(records)):
        record = records[k]
        name = record["image_id"].decode()
        try:
            images.decode(record["image"], images.Resize(32), name)
        except DataError:
            bad[k] = name
    return bad
