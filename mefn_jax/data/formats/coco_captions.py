"""Reader of TFDS's own `coco_captions`, built as array_record (docs/data.md, TFDS coco_captions).

Its splits are Karpathy's, and `restval` is training data. By protocol, the first five captions of an image are used.
TFDS stores examples in the order of a hash, so that consecutive folds are not those of Karpathy's file.
"""

from pathlib import Path

import numpy as np

from mefn_jax.data.formats.tfds_records import TfdsRecords, find_undecodable, open_builder
from mefn_jax.data.parsing import clean_caption
from mefn_jax.data.split import Split
from mefn_jax.errors import DataError

CAPTIONS_PER_IMAGE = 5
COCO_CAPTIONS = "coco_captions"


def _parse_example(example: dict, where: str) -> dict:
    """Converts an example of TFDS to a record of `Split`. Raises DataError if it has too few captions."""
    name, texts = example["image/filename"].decode(), example["captions"]["text"]
    where = f"{where}: {name}"
    if len(texts) < CAPTIONS_PER_IMAGE:
        raise DataError(f"{where}: {len(texts)} captions, fewer than {CAPTIONS_PER_IMAGE}; build the data set again")
    captions = [clean_caption(text.decode(), where) for text in texts[:CAPTIONS_PER_IMAGE]]
    return {"image": example["image"], "captions": captions, "image_id": name, "scene": None}


class CocoCaptions:
    """Splits of a directory that TFDS wrote."""

    tokenizer_json = None  # TFDS stores no tokenizer

    def __init__(self, directory: Path, skip_undecodable: bool = False):
        """Opens the directory. Raises DataError if its file format has no random access."""
        self.directory, self.skip_undecodable, self.metadata = directory, skip_undecodable, {}
        self.builder, _ = open_builder(directory)
        file_format = self.builder.info.file_format.value
        if file_format != "array_record":
            raise DataError(
                f"data.dir: {directory}: stored as {file_format}, which has no random access; build it with "
                "tfds build coco_captions --file_format=array_record"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """Returns the names of the splits; `restval` belongs to train."""
        return tuple(name for name in self.builder.info.splits if name != "restval")

    def split(self, name: str) -> Split:
        """Returns the split `name`, one of `splits`."""
        names = [name, *(["restval"] if name == "train" and "restval" in self.builder.info.splits else [])]
        records = TfdsRecords(self.builder, "+".join(names), _parse_example)
        undecodable = find_undecodable(records) if self.skip_undecodable else {}
        record_ids = np.delete(np.arange(len(records)), list(undecodable))
        caption_offsets = CAPTIONS_PER_IMAGE * np.arange(len(record_ids) + 1)
        return Split(name, records, record_ids, caption_offsets, list(undecodable.values()), source_order=False)
