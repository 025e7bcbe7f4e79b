"""Reader of data sets written by `mefn_jax.data.prepare`: TFDS in array_record, with a tokenizer.

docs/data.md (The prepared data set) describes the files.
"""

import json
from pathlib import Path

import numpy as np

from mefn_jax.data import tokenizer
from mefn_jax.data.formats.tfds_records import TfdsRecords, find_undecodable, open_builder
from mefn_jax.data.parsing import require
from mefn_jax.data.split import Split
from mefn_jax.errors import DataError


def _parse_example(example: dict, _) -> dict:
    """Converts an example of TFDS to a record of `Split`."""
    scene = example["scene"].decode()
    return {
        "image": example["image"],
        "captions": [c.decode() for c in example["captions"]],
        "image_id": example["image_id"].decode(),
        "scene": json.loads(scene) if scene else None,
    }


class Prepared:
    """Splits of a prepared data set; its `metadata` say how it was made."""

    def __init__(self, directory: Path, skip_undecodable: bool = False):
        """Opens the directory. Raises DataError if it was not made by this project."""
        self.directory, self.skip_undecodable = directory, skip_undecodable
        self.builder, self.metadata = open_builder(directory)
        if "caption_counts" not in self.metadata:
            raise DataError(
                f"data.dir: {directory}: neither made by python -m mefn_jax.data.prepare, nor TFDS coco_captions"
            )
        require(self.metadata, "caption_counts", dict, f"{directory}/metadata.json")

    @property
    def splits(self) -> tuple[str, ...]:
        """Returns the names of the splits."""
        return tuple(self.metadata["caption_counts"])

    @property
    def tokenizer_json(self) -> str:
        """Returns the text of the data set's `tokenizer.json`. Raises DataError if the file is missing."""
        return tokenizer.read_tokenizer_json(self.directory)

    def split(self, name: str) -> Split:
        """Returns the split `name`, one of `splits`. Raises DataError if its files do not fit the metadata."""
        where = f"{self.directory}/metadata.json: caption_counts"
        records = TfdsRecords(self.builder, name, _parse_example)
        counts = require(self.metadata["caption_counts"], name, list, where)
        if not all(type(count) is int and count > 0 for count in counts):
            raise DataError(f"{where}: {name!r} must be a list of whole numbers above 0; make the data set again")
        if len(counts) != len(records):
            raise DataError(
                f"{self.directory}: {len(records)} examples of {name}, but caption_counts has {len(counts)}; make the "
                "data set again"
            )
        undecodable = find_undecodable(records) if self.skip_undecodable else {}
        record_ids = np.delete(np.arange(len(records)), list(undecodable))
        caption_offsets = np.concatenate([[0], np.cumsum(np.asarray(counts)[record_ids])])
        return Split(name, records, record_ids, caption_offsets, list(undecodable.values()))
