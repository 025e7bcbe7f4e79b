"""Statistics of the captions of a data set: numbers, lengths, unknown tokens, repetitions."""

import dataclasses
import hashlib
import itertools

import numpy as np
from tqdm import tqdm

from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.data.word_augment import knows_sides, mentions_side

WHOLE = 512  # number of wordpieces that no caption exceeds
CAPTIONS_PER_CHUNK = 2000  # captions encoded at once
# Shares of wordpieces that are unknown, and of captions that are cut, from which on a training run warns.
MANY_UNKNOWN, MANY_CUT = 0.01, 0.05


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of the captions of one split.

    Attributes:
        texts: the captions as the tokenizer sees them.
        captions_per_image: int `(I,)`, the number of captions of each image.
        lengths: int `(C,)`, the number of wordpieces of each caption before it is cut.
        unknown: int `(C,)`, the number of unknown tokens of each caption.
        side_fraction: the fraction of captions that mention left or right, in [0, 1].
        image_digests: a digest of each image file; of the first region of an image if regions are precomputed, because
            all of them would take minutes to read.
    """

    texts: list[str]
    captions_per_image: np.ndarray
    lengths: np.ndarray
    unknown: np.ndarray
    side_fraction: float
    image_digests: list[bytes]


def compute_statistics(split: Split, tokenizer: Tokenizer) -> Statistics:
    """Computes the statistics of a split: reads all its captions, with a progress bar on a terminal."""
    captions, digests = [], []
    for k in tqdm(range(split.num_images), split.name, disable=None):
        record = split.record(k)
        captions += record["captions"]
        content = record["image"] if "image" in record else np.ascontiguousarray(record["regions"][0])
        digests.append(hashlib.blake2b(content, digest_size=16).digest())
    lengths, unknown = count_wordpieces(captions, tokenizer)
    texts = [tokenizer.normalize(c) for c in captions]
    side_fraction = float(np.mean([mentions_side(c) for c in captions]))
    return Statistics(texts, np.diff(split.caption_offsets), lengths, unknown, side_fraction, digests)


def count_wordpieces(captions: list[str], t: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of wordpieces of each caption before it is cut, and how many of them are unknown, int
    `(C,)`."""
    uncut_tokenizer = Tokenizer(t.json, max(WHOLE, t.max_tokens + 1), t.lower_case, t.punctuation)
    lengths, unknown = [], []
    for start in range(0, len(captions), CAPTIONS_PER_CHUNK):
        ids, mask = uncut_tokenizer(captions[start : start + CAPTIONS_PER_CHUNK])
        lengths.append(mask.sum(1) - 1 - t.first_word)
        unknown.append(np.zeros(len(ids), int) if t.unknown is None else (ids == t.unknown).sum(1))
    return np.concatenate(lengths), np.concatenate(unknown)


def summarize_text(split: Split, tokenizer: Tokenizer, flips: bool) -> tuple[str, list[str]]:
    """Returns how well a tokenizer fits the captions of a split, as a line of text, and what to warn of.

    Takes a sample of the captions (`Split.sampled_captions`). `flips` says whether images are to be mirrored.
    """
    captions = split.sampled_captions
    lengths, unknown = count_wordpieces(captions, tokenizer)
    cut, unknown_share = int(np.sum(lengths > tokenizer.max_tokens)), unknown.sum() / max(1, lengths.sum())
    sample = f"{len(captions):,} captions" if len(captions) == split.num_captions else f"a sample of {len(captions):,}"
    line = f"{100 * unknown_share:.2f} % of wordpieces unknown, {cut:,} of {sample} cut at {tokenizer.max_tokens}"
    warnings = []
    if unknown_share >= MANY_UNKNOWN:
        examples = ", ".join(repr(captions[k][:60]) for k in np.flatnonzero(unknown)[:2])
        warnings.append(
            f"warning: {100 * unknown_share:.1f} % of the wordpieces of {split.name} are unknown to the tokenizer, as "
            f"in {examples}; the model cannot tell them apart: prepare the data set again, which trains a tokenizer on "
            "its captions, or take another text tower"
        )
    if cut >= MANY_CUT * len(captions):
        warnings.append(
            f"warning: {100 * cut / len(captions):.1f} % of the captions of {split.name} are cut at text.max_tokens="
            f"{tokenizer.max_tokens} wordpieces; the longest has {lengths.max()}"
        )
    if flips and not knows_sides(captions):
        warnings.append(
            "note: augment.flip is off: the captions are not English, and hardly any says left or right in a "
            "language that mefn_jax/data/word_augment.py knows; add its words there"
        )
    return line, warnings


def format_statistics(statistics: dict[str, Statistics], tokenizer: Tokenizer) -> list[str]:
    """Returns the statistics of splits, given by name, as lines of text."""
    columns = ("images", "captions", "an image", "wordpieces", "longest", "cut off", "unknown", "left/right")
    lines = [f"{'':9}" + "".join(f"{c:>12}" for c in columns)]
    for name, s in statistics.items():
        per_image = (
            str(s.captions_per_image.min())
            if s.captions_per_image.min() == s.captions_per_image.max()
            else f"{s.captions_per_image.min()} to {s.captions_per_image.max()}"
        )
        cells = [
            f"{len(s.captions_per_image):,}",
            f"{len(s.lengths):,}",
            per_image,
            f"{s.lengths.mean():.1f}",
            f"{s.lengths.max()}",
        ]
        cells += [
            f"{100 * x:.2f} %"
            for x in (np.mean(s.lengths > tokenizer.max_tokens), unknown_fraction(s), s.side_fraction)
        ]
        lines.append(f"{name:9}" + "".join(f"{c:>12}" for c in cells))
    lines += ["", *_format_examples(statistics)]
    lines += [
        "captions by number of wordpieces:",
        *format_histogram(np.concatenate([s.lengths for s in statistics.values()])),
    ]
    return [*lines, "", *format_duplicates(statistics)]


def unknown_fraction(s: Statistics) -> float:
    """Returns the fraction of wordpieces that are unknown tokens, in [0, 1]."""
    return float(s.unknown.sum() / max(1, s.lengths.sum()))


def _format_examples(statistics: dict[str, Statistics]) -> list[str]:
    """Returns lines with two captions of each split that have an unknown token."""
    lines = [f"  {name}: {s.texts[k]}" for name, s in statistics.items() for k in np.flatnonzero(s.unknown)[:2]]
    return ["captions with an unknown token:", *lines, ""] if lines else []


def format_histogram(lengths: np.ndarray, max_bins: int = 16, width: int = 50) -> list[str]:
    """Returns lines that draw a histogram of lengths with at most `max_bins` bins of equal width; the longest bar is
    `width` characters long."""
    bin_width = -(-(int(lengths.max()) + 1) // max_bins)
    counts = np.bincount(lengths // bin_width)
    return [
        f"{k * bin_width:4} to {k * bin_width + bin_width - 1:3} {n:10,} {'#' * round(width * n / counts.max())}"
        for k, n in enumerate(counts)
    ]


def format_duplicates(statistics: dict[str, Statistics]) -> list[str]:
    """Returns lines with the numbers of captions and of images that repeat another of their split, and of those that
    two splits share: captions word for word, images byte for byte (precomputed ones by their first region)."""
    return [
        *_format_repeated("captions", {name: s.texts for name, s in statistics.items()}),
        *_format_repeated("images", {name: s.image_digests for name, s in statistics.items()}),
    ]


def _format_repeated(kind: str, items: dict[str, list]) -> list[str]:
    """Returns lines with the number of items that occur a second time in their split, and of those in two splits."""
    sets = {name: set(values) for name, values in items.items()}
    lines = [
        f"{len(values) - len(sets[name]):,} {kind} of {name} repeat another of {name}" for name, values in items.items()
    ]
    for a, b in itertools.combinations(items, 2):
        num_shared = sum(value in sets[a] for value in items[b])
        lines.append(f"{num_shared:,} {kind} of {b} ({100 * num_shared / len(items[b]):.2f} %) stand in {a} too")
    return lines
