"""Digests that tell whether a run or an evaluation was made from the same images and captions.

They depend on the ids of the images and on the captions, in their order, not on where or in which format these are
stored. Digests are compared as texts; None means that it is not known what something was made from.
"""

import hashlib
import json

import numpy as np

from mefn_jax.data.dataset import Dataset
from mefn_jax.data.formats import cached_words
from mefn_jax.data.split import Split, spread_positions
from mefn_jax.errors import DataError

# Images whose captions are read for the digest of a run's data. Reading all records of COCO, images included, would
# delay every start by minutes. Splits without stored images are read whole.
DIGESTED_IMAGES = 2048
DIGESTED_FEATURES = 64  # rows of precomputed regions, and of cached words
# Parts of `digest_data`, as messages name them.
PARTS = {
    "train": "the image ids or captions of train",
    "val": "the image ids or captions of val",
    "features": "the precomputed regions or cached text of train",
}


def digest_gallery(split: Split) -> str:
    """Returns the digest of a split's image ids and captions; reads all its records."""
    return _digest_captions(split.caption_offsets, split.ids_and_captions)


def digest_data(dataset: Dataset) -> dict[str, str | None]:
    """Returns the digests of the data that a run is made from, by the names of PARTS.

    They are of the stored splits, whatever images are held out or skipped. A part is None if it does not exist or
    cannot be read. They are quick: of splits with images, at most DIGESTED_IMAGES records are read.
    """
    digests = dict.fromkeys(PARTS)
    for name in ("train", "val"):
        try:
            split = dataset.stored_split(name)
            if split is not None:
                number = split.num_images if split.region_width else DIGESTED_IMAGES
                records = (split.records[int(k)] for k in spread_positions(len(split.records), number))
                sample = ((record["image_id"], record["captions"]) for record in records)
                digests[name] = _digest_captions(split.caption_offsets, sample)
                if name == "train":
                    digests["features"] = _digest_features(dataset, split)
        except DataError:
            continue  # the code that needs the split opens it again, and reports the error
    return digests


def digest_split(split: Split) -> str:
    """Returns a digest of a split as it is used, without the images that are held out or skipped, by which positions in
    it are known to mean the same: of all numbers of captions, and of the ids and captions of some images."""
    records = map(split.record, spread_positions(split.num_images, DIGESTED_IMAGES))
    return _digest_captions(split.caption_offsets, ((record["image_id"], record["captions"]) for record in records))


def find_changes(old: dict | None, new: dict) -> list[str]:
    """Returns the values of PARTS for the parts that differ between two results of `digest_data`. A part that is None
    in one of them does not count as different."""
    return [
        text
        for part, text in PARTS.items()
        if None not in (known := ((old or {}).get(part), new[part])) and known[0] != known[1]
    ]


def digest_text(text: str) -> str:
    """Returns the digest of a text, such as a tokenizer's JSON."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digest_captions(caption_offsets: np.ndarray, ids_and_captions) -> str:
    """Returns the digest of the number of captions of every image (`caption_offsets`), and of the pairs (image id,
    captions) that are given."""
    digest = hashlib.sha256(np.ascontiguousarray(caption_offsets, "<i8"))
    for image_id, captions in ids_and_captions:
        digest.update(json.dumps([image_id, captions]).encode())
    return digest.hexdigest()


def _digest_features(dataset: Dataset, train: Split) -> str | None:
    """Returns the digest of some regions and cached words of train; None if it has neither."""
    arrays = []
    if train.region_width:
        arrays += [train.records[int(k)]["regions"] for k in spread_positions(len(train.records), DIGESTED_FEATURES)]
    if dataset.cached_text:
        words = cached_words.map_words(dataset.cached_text, train.name)
        arrays += [words[k] for k in spread_positions(len(words), DIGESTED_FEATURES)]
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(f"{x.dtype.str}{x.shape}".encode() + x.tobytes())
    return digest.hexdigest() if arrays else None
