"""What the captions of a data set are like: how many, how long, how much of them the tokenizer knows, repetitions."""

import dataclasses
import itertools

import numpy as np
from tqdm import tqdm

from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import Tokenizer, normalize_caption
from mefn_jax.data.word_augment import mentions_side

WHOLE = 512  # wordpieces, more than any caption has
CAPTIONS_PER_CHUNK = 2000  # captions encoded at once


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one split's captions.

    Attributes:
        texts: the captions as the tokenizer sees them.
        each: int `(I,)`, captions of each image.
        lengths: int `(C,)`, wordpieces of each caption, however many are kept.
        unknown: int `(C,)`, how many of them are the unknown token.
        sides: the share of captions that say left or right, in [0, 1].
    """

    texts: list[str]
    each: np.ndarray
    lengths: np.ndarray
    unknown: np.ndarray
    sides: float


def compute_statistics(split: Split, tokenizer: Tokenizer) -> Statistics:
    """Reads all captions of a split, with a progress bar on a terminal."""
    t = tokenizer
    whole = Tokenizer(t.json, WHOLE, t.lower_case, t.punctuation)
    raw = [c for k in tqdm(range(split.num_images), split.name, disable=None) for c in split.record(k)["captions"]]
    lengths, unknown = [], []
    for start in range(0, len(raw), CAPTIONS_PER_CHUNK):
        ids, mask = whole(raw[start : start + CAPTIONS_PER_CHUNK])
        lengths.append(mask.sum(1) - 2)
        unknown.append(np.zeros(len(ids), int) if t.unknown is None else (ids == t.unknown).sum(1))
    texts = [normalize_caption(c, t.lower_case, t.punctuation) for c in raw]
    sides = float(np.mean([mentions_side(c) for c in raw]))
    return Statistics(texts, np.diff(split.caption_offsets), np.concatenate(lengths), np.concatenate(unknown), sides)


def format_statistics(found: dict[str, Statistics], tokenizer: Tokenizer) -> list[str]:
    """The statistics of splits by name as lines of text."""
    columns = ("images", "captions", "an image", "wordpieces", "longest", "cut off", "unknown", "left/right")
    lines = [f"{'':9}" + "".join(f"{c:>12}" for c in columns)]
    for name, s in found.items():
        each = str(s.each.min()) if s.each.min() == s.each.max() else f"{s.each.min()} to {s.each.max()}"
        cells = [f"{len(s.each):,}", f"{len(s.lengths):,}", each, f"{s.lengths.mean():.1f}", f"{s.lengths.max()}"]
        cells += [f"{100 * x:.2f} %" for x in (np.mean(s.lengths > tokenizer.max_tokens), unknown_fraction(s), s.sides)]
        lines.append(f"{name:9}" + "".join(f"{c:>12}" for c in cells))
    lines += ["", *_examples(found)]
    lines += ["captions by their wordpieces:", *format_histogram(np.concatenate([s.lengths for s in found.values()]))]
    return [*lines, "", *format_duplicates(found)]


def unknown_fraction(s: Statistics) -> float:
    """The share of wordpieces that are the unknown token, in [0, 1]."""
    return float(s.unknown.sum() / max(1, s.lengths.sum()))


def _examples(found: dict[str, Statistics]) -> list[str]:
    texts = [f"  {name}: {s.texts[k]}" for name, s in found.items() for k in np.flatnonzero(s.unknown)[:2]]
    return ["captions with an unknown token:", *texts, ""] if texts else []


def format_histogram(lengths: np.ndarray, most: int = 16, width: int = 50) -> list[str]:
    """Bars of how many captions have so many wordpieces, in at most `most` bins of one width."""
    step = -(-(int(lengths.max()) + 1) // most)
    counts = np.bincount(lengths // step)
    return [
        f"{k * step:4} to {k * step + step - 1:3} {n:10,} {'#' * round(width * n / counts.max())}"
        for k, n in enumerate(counts)
    ]


def format_duplicates(found: dict[str, Statistics]) -> list[str]:
    """How many captions stand in two splits, word for word, and how many twice in one."""
    sets = {name: set(s.texts) for name, s in found.items()}
    lines = [
        f"{len(s.texts) - len(sets[name]):,} captions of {name} repeat another of {name}" for name, s in found.items()
    ]
    for a, b in itertools.combinations(found, 2):
        number = sum(text in sets[a] for text in found[b].texts)
        lines.append(f"{number:,} captions of {b} ({100 * number / len(found[b].texts):.2f} %) stand in {a} too")
    return lines
