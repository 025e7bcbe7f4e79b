"""A directory written by `mefn_jax.data.prepare`: a TFDS data set in array_record, and its tokenizer."""

import json
from pathlib import Path

import numpy as np

from mefn_jax.data import tokenizer
from mefn_jax.data.formats.tfds_records import TfdsRecords, find_undecodable, open_builder
from mefn_jax.data.split import Split
from mefn_jax.errors import DataError


def _record(example: dict, _) -> dict:
    scene = example["scene"].decode()
    return {
        "image": example["image"],
        "captions": [c.decode() for c in example["captions"]],
        "image_id": example["image_id"].decode(),
        "scene": json.loads(scene) if scene else None,
    }


class Prepared:
    """The splits of a prepared data set; `facts` says how it was made."""

    def __init__(self, directory: Path, skip_undecodable: bool = False):
        """Opens it. Raises DataError if it was not made by this project."""
        self.directory, self.skip_undecodable = directory, skip_undecodable
        self.builder, self.metadata = open_builder(directory)
        if "caption_counts" not in self.metadata:
            raise DataError(
                f"data.dir: {directory}: neither made by python -m mefn_jax.data.prepare, nor TFDS coco_captions"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.metadata["caption_counts"])

    @property
    def tokenizer_json(self) -> str:
        """The text of the data set's `tokenizer.json`. Raises DataError if it has none."""
        return tokenizer.read_tokenizer_json(self.directory)

    def split(self, name: str) -> Split:
        """The split `name`, one of `splits`."""
        records, counts = TfdsRecords(self.builder, name, _record), self.metadata["caption_counts"][name]
        if len(counts) != len(records):
            raise DataError(f"{self.directory}: {len(records)} examples of {name}, caption_counts of {len(counts)}")
        bad = find_undecodable(records) if self.skip_undecodable else {}
        rows = np.delete(np.arange(len(records)), list(bad))
        first = np.concatenate([[0], np.cumsum(np.asarray(counts)[rows])])
        return Split(name, records, rows, first, list(bad.values()))
