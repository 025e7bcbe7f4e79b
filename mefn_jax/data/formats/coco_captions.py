"""TFDS's own `coco_captions`, built as array_record, read as it is (PEERS.md 1).

Its splits are Karpathy's; `restval` is training data. Of an image's captions the first five are used, by protocol.
TFDS stores examples in the order of a hash: consecutive folds are not those of Karpathy's file.
"""

from pathlib import Path

import numpy as np

from mefn_jax.data.formats.tfds_records import TfdsRecords, find_undecodable, open_builder
from mefn_jax.data.parsing import clean_caption
from mefn_jax.data.split import Split
from mefn_jax.errors import DataError

CAPTIONS_PER_IMAGE = 5
COCO_CAPTIONS = "coco_captions"


def _record(example: dict, where: str) -> dict:
    name, texts = example["image/filename"].decode(), example["captions"]["text"]
    where = f"{where}: {name}"
    if len(texts) < CAPTIONS_PER_IMAGE:
        raise DataError(f"{where}: {len(texts)} captions, fewer than {CAPTIONS_PER_IMAGE}; build the data set again")
    captions = [clean_caption(text.decode(), where) for text in texts[:CAPTIONS_PER_IMAGE]]
    return {"image": example["image"], "captions": captions, "image_id": name, "scene": None}


class CocoCaptions:
    """The splits of a directory that TFDS wrote."""

    tokenizer_json = None  # TFDS stores none

    def __init__(self, directory: Path, skip_undecodable: bool = False):
        """Opens it. Raises DataError if it is stored in a form without random access."""
        self.directory, self.skip_undecodable, self.metadata = directory, skip_undecodable, {}
        self.builder, _ = open_builder(directory)
        form = self.builder.info.file_format.value
        if form != "array_record":
            raise DataError(
                f"data.dir: {directory}: stored as {form}, which has no random access; build it with "
                "tfds build coco_captions --file_format=array_record"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits; `restval` belongs to train."""
        return tuple(name for name in self.builder.info.splits if name != "restval")

    def split(self, name: str) -> Split:
        """The split `name`, one of `splits`."""
        names = [name, *(["restval"] if name == "train" and "restval" in self.builder.info.splits else [])]
        records = TfdsRecords(self.builder, "+".join(names), _record)
        bad = find_undecodable(records) if self.skip_undecodable else {}
        rows = np.delete(np.arange(len(records)), list(bad))
        first = CAPTIONS_PER_IMAGE * np.arange(len(rows) + 1)
        return Split(name, records, rows, first, list(bad.values()), source_order=False)
