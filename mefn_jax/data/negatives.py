"""Hard negatives of captions: the file that `eval.py mine` writes, and an order of captions that puts them together.

A file is safetensors, which is data alone. C captions of the training split, K negatives each:

    captions  int32 (C, K), the hard negatives of each caption, hardest first and of K different images; -1 where fewer
    scores    float32 (C, K), the model's scores of the caption with the images of these
    texts     int32 (C,), the first caption with the same text as each, as `loss.skip_equal_captions` compares texts

Its metadata is one JSON object: the number `format` of this layout, the digest of the split (`digest_split`), that of
the model's parameters, the step of its checkpoint, and the numbers `k` and `candidates` of the command.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mefn_jax.config import require_local
from mefn_jax.data.digests import digest_split
from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError, DataError, reason
from mefn_jax.runtime.formats import Format
from mefn_jax.runtime.storage import write_atomic

NEGATIVES_FORMAT = Format(1, DataError, "mine them again")
METADATA_KEY = "negatives"  # the only key of the file's metadata: safetensors writes several in any order
TENSORS = {"captions": (np.int32, 2), "scores": (np.float32, 2), "texts": (np.int32, 1)}  # types and numbers of axes


@dataclasses.dataclass(frozen=True)
class HardNegatives:
    """Hard negatives of C captions of I images.

    Attributes:
        captions: int32 `(C, K)`, the negatives of each caption, hardest first; -1 where there are fewer.
        texts: int `(C,)`, the first caption with the same text as each.
        caption_image: int `(C,)`, the image of each caption.
    """

    captions: np.ndarray
    texts: np.ndarray
    caption_image: np.ndarray

    @functools.cached_property
    def _descriptions(self) -> np.ndarray:
        """Returns numbers of the pairs (image, text) that the data has, int64, sorted."""
        return np.unique(self._number(self.caption_image, self.texts))

    def _number(self, images, texts) -> np.ndarray:
        return np.asarray(images, np.int64) * len(self.texts) + texts

    def is_negative(self, a, b) -> np.ndarray:
        """Returns whether captions `a` and `b` (numbers, or arrays of one shape) may be negatives of each other, bool:
        their images differ, and no caption of the one's image has the other's text."""
        described = self._describes(self.caption_image[a], self.texts[b])
        return ~(described | self._describes(self.caption_image[b], self.texts[a]))

    def _describes(self, images, texts) -> np.ndarray:
        """Returns whether images have a caption with a text; an image has all texts of its own captions."""
        wanted = self._number(images, texts)
        found = np.searchsorted(self._descriptions, wanted)
        return self._descriptions[np.minimum(found, len(self._descriptions) - 1)] == wanted


def number_texts(digests: np.ndarray) -> np.ndarray:
    """Returns the first caption with the same digest as each, int32 `(C,)`, from `pipeline.digest_captions`."""
    _, first, same = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    return first[same.reshape(-1)].astype(np.int32)


def write_negatives(path: epath.Path, negatives: HardNegatives, scores: np.ndarray, metadata: dict) -> None:
    """Writes a file of hard negatives. Equal arguments give equal bytes. Raises ConfigError."""
    metadata = {"format": NEGATIVES_FORMAT.number} | metadata
    arrays = {"captions": negatives.captions, "scores": scores, "texts": negatives.texts}
    arrays = {name: np.ascontiguousarray(arrays[name], kind) for name, (kind, _) in TENSORS.items()}
    try:
        write_atomic(path, save(arrays, {METADATA_KEY: json.dumps(metadata, sort_keys=True)}))
    except OSError as e:
        raise ConfigError(f"--out={path}: cannot be written ({reason(e)})") from e


def is_negatives(path: Path) -> bool:
    """Returns whether a file holds hard negatives (as `write_negatives` writes them)."""
    with safe_open(path, "numpy") as file:
        return METADATA_KEY in (file.metadata() or {})


def read_negatives(path: str, split: Split) -> HardNegatives:
    """Reads the hard negatives of a split. Raises ConfigError for a URL, DataError if the file cannot be read,
    belongs to other images or captions, or names a caption that is no negative."""
    require_local("data.negatives", path)
    subject = f"data.negatives={path}"
    try:
        with safe_open(path, "numpy") as file:
            metadata = json.loads((file.metadata() or {})[METADATA_KEY])
            metadata = NEGATIVES_FORMAT.upgrade(metadata, subject)
            arrays = {name: file.get_tensor(name) for name in TENSORS}
    except FileNotFoundError:
        raise DataError(f"{subject}: no such file; make it with python eval.py mine --out={path}") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(f"{subject}: cannot be read as hard negatives ({reason(e)}); mine them again") from None
    number = split.num_captions
    for name, (kind, axes) in TENSORS.items():
        if arrays[name].dtype != kind or arrays[name].ndim != axes:
            raise DataError(f"{subject}: {name} is {arrays[name].dtype} {arrays[name].shape}; mine them again")
    if any(len(x) != number for x in arrays.values()) or metadata.get("split") != digest_split(split):
        raise DataError(
            f"{subject}: was mined from other images or captions than train has here ({number} captions); mine them "
            "again, from a run on these data with the same data.held_out_images and data.skip_undecodable"
        )
    negatives = HardNegatives(arrays["captions"], arrays["texts"], split.caption_image)
    _check_negatives(subject, negatives)
    return negatives


def _check_negatives(subject: str, negatives: HardNegatives) -> None:
    """Raises DataError, naming the first, for numbers that are no captions, and for negatives that are none."""
    captions, number = negatives.captions, len(negatives.texts)
    if number and not (captions.min(initial=-1) >= -1 and captions.max(initial=-1) < number):
        raise DataError(f"{subject}: names captions that do not exist; mine them again")
    if number and not (negatives.texts.min() >= 0 and negatives.texts.max() < number):
        raise DataError(f"{subject}: names texts that do not exist; mine them again")
    for column in captions.T:
        rows = np.flatnonzero(column >= 0)
        wrong = rows[~negatives.is_negative(rows, column[rows])]
        if len(wrong):
            raise DataError(
                f"{subject}: caption {column[wrong[0]]} is no negative of caption {wrong[0]}; mine them again"
            )


def digest_file(path: str) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def arrange_groups(negatives: HardNegatives, size: int, rng: np.random.Generator, lead: int = 0) -> np.ndarray:
    """Returns all C captions in an order in which groups of `size` stand together: a caption and the hardest of its
    negatives that are free, any two of which are negatives of each other; int64 `(C,)`.

    Captions are visited in a random order. Those that find too few free negatives form groups with one another; which
    these are differs each time. Groups come in a random order, after `lead` captions without a group. The order is a
    pure function of the arguments.
    """
    groups, partial = _form_groups(negatives, size, rng.permutation(len(negatives.texts)).tolist())
    head = _take_captions(partial, groups, lead)
    groups += _join_partial(partial, size)
    tail = groups.pop() if groups and len(groups[-1]) < size else []
    blocks = np.array(groups, np.int64).reshape(-1, size)
    blocks = blocks[rng.permutation(len(blocks))]
    return np.concatenate([np.array(head, np.int64), blocks.reshape(-1), np.array(tail, np.int64)])


def _form_groups(negatives: HardNegatives, size: int, order: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the full groups of captions, and those that lack negatives."""
    is_free, groups, partial = bytearray(b"\1") * len(order), [], []
    for caption in order:
        if not is_free[caption]:
            continue
        is_free[caption], group = 0, [caption]
        for other in negatives.captions[caption].tolist():
            if len(group) == size:
                break
            # The caption's own negatives are negatives; those among themselves need not be.
            if other >= 0 and is_free[other] and (len(group) == 1 or negatives.is_negative(group[1:], other).all()):
                is_free[other] = 0
                group.append(other)
        (groups if len(group) == size else partial).append(group)
    return groups, partial


def _take_captions(partial: list[list[int]], groups: list[list[int]], number: int) -> list[int]:
    """Removes and returns a number of captions, or all there are: of the smallest partial groups, then of full ones."""
    taken = []
    partial.sort(key=len, reverse=True)
    while len(taken) < number and (partial or groups):
        group, wanted = (partial or groups).pop(), number - len(taken)
        taken += group[:wanted]
        if group[wanted:]:
            partial.append(group[wanted:])
    return taken


def _join_partial(partial: list[list[int]], size: int) -> list[list[int]]:
    """Returns partial groups joined to groups of `size`, the last one perhaps smaller. A group is cut in two only if no
    other fits."""
    by_length = {length: [group for group in partial if len(group) == length] for length in range(1, size)}
    joined = []
    while any(by_length.values()):
        block = []
        while len(block) < size and any(by_length.values()):
            wanted = size - len(block)
            lengths = [length for length, groups in by_length.items() if groups]
            group = by_length[max((n for n in lengths if n <= wanted), default=lengths[0])].pop()
            block += group[:wanted]
            if group[wanted:]:
                by_length[len(group) - wanted].append(group[wanted:])
        joined.append(block)
    return joined
