"""Mixtures of data sets with weights, `data.dir=A:0.7,B:0.3`: the split that training reads.

The training splits follow one another, so that what is computed from all training data (statistics, vocabulary,
constants) reads each image once. Batches draw from them by their weights (`order.MixedCaptions`).
"""

import dataclasses
import os
import re
from fractions import Fraction

import numpy as np

from mefn_jax.data.order import SMALLEST_SHARE
from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError

WEIGHT = r"(?P<path>.+):(?P<weight>[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})"


def parse_mixture(text: str) -> list[tuple[str, Fraction]]:
    """Returns the directories of `data.dir` and their shares, which sum to 1: of `A:0.7,B:0.3` A has 7/10 and B 3/10.
    A path without a weight, or one that exists as written, is a single data set with share 1.

    Raises ConfigError if some directories of a list have no weight, a weight is 0, a directory occurs twice, or a share
    is too small.
    """
    parts = text.split(",")
    if len(parts) == 1 or os.path.lexists(text):
        return [(text, Fraction(1))]
    matches = [re.fullmatch(WEIGHT, part.strip()) for part in parts]
    if not any(matches):
        return [(text, Fraction(1))]
    if not all(matches):
        part = parts[[bool(m) for m in matches].index(False)]
        raise ConfigError(f"data.dir={text}: {part!r} has no weight; write a mixture as A:0.7,B:0.3")
    paths = [os.path.expanduser(match["path"]) for match in matches]
    weights = [Fraction(match["weight"]) for match in matches]
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise ConfigError(f"data.dir={text}: a directory occurs twice; give each once, with one weight")
    if min(weights) == 0 or min(weights) / sum(weights) < SMALLEST_SHARE:
        raise ConfigError(
            f"data.dir={text}: a weight is 0 or below {float(SMALLEST_SHARE):.4f} of all; leave it out, or raise it"
        )
    return [(path, weight / sum(weights)) for path, weight in zip(paths, weights, strict=True)]


class MixedRecords:
    """Records of several splits one after the other, in the form that `Split` needs. They have no drawn scenes, because
    these name their twins by position."""

    def __init__(self, splits: list[Split]):
        self.splits = splits
        self.firsts = np.concatenate([[0], np.cumsum([split.num_images for split in splits])])

    def __len__(self):
        return int(self.firsts[-1])

    def __getitem__(self, row: int) -> dict:
        """Returns a record."""
        k = int(np.searchsorted(self.firsts, row, "right")) - 1
        return self.splits[k].record(row - self.firsts[k]) | {"scene": None}

    def read(self, rows) -> np.ndarray:
        """Returns the precomputed regions of rows, `(B, N, C)`."""
        rows = np.asarray(rows)
        owners = np.searchsorted(self.firsts, rows, "right") - 1
        regions = None
        for k in np.unique(owners).tolist():
            mine, split = owners == k, self.splits[k]
            part = split.records.read(split.record_ids[rows[mine] - self.firsts[k]])
            if regions is None:
                regions = np.empty((len(rows), *part.shape[1:]), part.dtype)
            regions[mine] = part
        return regions


@dataclasses.dataclass
class MixedSplit(Split):
    """Training splits of several data sets, one after the other, that batches draw from by their shares.

    Attributes:
        names: directories of the data sets.
        images_of_parts, captions_of_parts: the numbers of images and captions of each.
        shares: of each in the batches; they sum to 1.
    """

    names: list[str] = dataclasses.field(default_factory=list)
    images_of_parts: list[int] = dataclasses.field(default_factory=list)
    captions_of_parts: list[int] = dataclasses.field(default_factory=list)
    shares: list[Fraction] = dataclasses.field(default_factory=list)

    def describe(self) -> str:
        """Returns the data sets with their shares and numbers, and which of them the other splits belong to."""
        parts = zip(self.names, self.shares, self.images_of_parts, self.captions_of_parts, strict=True)
        texts = [f"{float(100 * share):.1f} % {name} ({i:,} images, {c:,} captions)" for name, share, i, c in parts]
        return f"{', '.join(texts)}; other splits of {self.names[0]}"

    def first_images(self, number: int) -> Split:
        """Returns a split of at most `number` images, the first of each data set in its share; of all images for 0."""
        if not 0 < number < self.num_images:
            return self
        firsts = np.concatenate([[0], np.cumsum(self.images_of_parts)])
        numbers = [
            min(size, int(number * share)) for size, share in zip(self.images_of_parts, self.shares, strict=True)
        ]
        return self._select(np.concatenate([f + np.arange(n) for f, n in zip(firsts[:-1], numbers, strict=True)]))

    def take(self, name: str, start: int, stop: int) -> Split:
        """Returns the images `start : stop` as a split called `name`, which is no mixture any more."""
        return dataclasses.replace(self._select(np.arange(self.num_images)[start:stop]), name=name)

    def _select(self, images: np.ndarray) -> Split:
        counts = np.diff(self.caption_offsets)[images]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return Split(self.name, self.records, self.record_ids[images], offsets, self.skipped, self.region_width, False)


def mix_splits(splits: list[Split], shares: list[Fraction], names: list[str]) -> MixedSplit:
    """Returns the mixture of training splits. Raises ConfigError, naming the data sets, if some have images and others
    precomputed regions, or regions of another shape or type."""
    kinds = [_describe_kind(split) for split in splits]
    for name, kind in zip(names, kinds, strict=True):
        if kind != kinds[0]:
            raise ConfigError(f"data.dir: {names[0]} has {kinds[0]}, but {name} has {kind}; mix data sets of one kind")
    captions = [split.num_captions for split in splits]
    firsts = np.concatenate([[0], np.cumsum(captions)[:-1]])
    offsets = [split.caption_offsets[1:] + first for split, first in zip(splits, firsts, strict=True)]
    records = MixedRecords(splits)
    return MixedSplit(
        name=splits[0].name,
        records=records,
        record_ids=np.arange(len(records)),
        caption_offsets=np.concatenate([[0], *offsets]),
        skipped=[name for split in splits for name in split.skipped],
        region_width=splits[0].region_width,
        source_order=False,
        names=list(names),
        images_of_parts=[split.num_images for split in splits],
        captions_of_parts=captions,
        shares=list(shares),
    )


def _describe_kind(split: Split) -> str:
    if not split.region_width:
        return "images"
    regions = split.records.read(split.record_ids[:1])
    return f"regions {' x '.join(map(str, regions.shape[1:]))} of {regions.dtype}"
