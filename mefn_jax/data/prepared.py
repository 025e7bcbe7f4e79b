"""A directory written by `mefn_jax.data.prepare`: a TFDS data set in array_record, and its tokenizer."""

import json
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from mefn_jax.data import images, tokenizer
from mefn_jax.data.split import Split
from mefn_jax.errors import DataError


class Records:
    """A TFDS data source's examples, as `Split` wants them."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, row: int) -> dict:
        raw = self.source[row]
        scene = raw["scene"].decode()
        return {
            "image": raw["image"],
            "captions": [c.decode() for c in raw["captions"]],
            "image_id": raw["image_id"].decode(),
            "scene": json.loads(scene) if scene else None,
        }


class Prepared:
    """The splits of a prepared data set; `facts` says how it was made."""

    def __init__(self, directory: Path, skip_bad: bool = False):
        """Opens it. Raises DataError if it was not made by this project."""
        self.directory, self.skip_bad = directory, skip_bad
        self.builder = tfds.builder_from_directory(str(directory))
        self.facts = dict(self.builder.info.metadata or {})
        if "caption_counts" not in self.facts:
            raise DataError(
                f"data.dir: {directory}: neither made by python -m mefn_jax.data.prepare, nor TFDS coco_captions"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.facts["caption_counts"])

    @property
    def tokenizer_json(self) -> str:
        """The text of the data set's `tokenizer.json`. Raises DataError if it has none."""
        return tokenizer.read_json(self.directory)

    def split(self, name: str) -> Split:
        """The split `name`, one of `splits`."""
        source = self.builder.as_data_source(name, decoders={"image": tfds.decode.SkipDecoding()})
        records = Records(source)
        bad = undecodable(records) if self.skip_bad else {}
        rows = np.delete(np.arange(len(records)), list(bad))
        first = np.concatenate([[0], np.cumsum(np.asarray(self.facts["caption_counts"][name])[rows])])
        return Split(name, records, rows, first, list(bad.values()))


def undecodable(records) -> dict[int, str]:
    """Position and name of the images that cannot be decoded; decodes every one."""
    bad = {}
    for k in range(len(records)):
        record = records[k]
        try:
            images.decode(record["image"], images.Resize(32), record["image_id"])
        except DataError:
            bad[k] = record["image_id"]
    return bad
