"""Corrections of the scores of a whole gallery at test time (`eval.py --transductive`): a yardstick of the hubness
correction that is learned.

They are transductive: a pair's corrected score depends on the other queries, on the gallery, or on a bank of training
queries scored against the gallery. I images, C captions; scores are float32 `(I, C)`. Each method returns the scores
that rank captions for an image (i2t) and those that rank images for a caption (t2i) (docs/method.md, Eqs. 36, 67, 68).
"""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mefn_jax import metrics
from mefn_jax.config import suggest
from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.features import Features
from mefn_jax.scoring.ranking import rank
from mefn_jax.scoring.tiles import TILE_CAPTIONS, TILE_IMAGES, even_slices

BANK_IMAGES = 1000  # training images whose pairs are the querybank


class Bank(NamedTuple):
    """Scores of training queries against the gallery: images `(B, C)` with its captions, captions `(I, K)` with its
    images."""

    images: np.ndarray
    captions: np.ndarray


def csls(scores, bank, neighbors: float):
    """Returns cross-domain similarity local scaling (Conneau et al. 2018): `2 s` minus the mean score of the image's
    nearest captions, minus that of the caption's nearest images."""

    def mean_of_nearest(axis: int):
        k = min(int(neighbors), scores.shape[axis])
        return np.mean(np.take(np.sort(scores, axis), range(-k, 0), axis), axis, keepdims=True)

    corrected = 2 * scores - mean_of_nearest(1) - mean_of_nearest(0)
    return corrected, corrected


def dual_softmax(scores, bank, scale: float):
    """Returns the logarithm, divided by `scale`, of the product of a softmax over the gallery and one over the queries
    (Cheng et al. 2021), without the factor that is the same for all of a query's gallery."""
    return 2 * scores - soft_maximum(scores, scale, 0), 2 * scores - soft_maximum(scores, scale, 1)


def querybank(scores, bank: Bank, scale: float):
    """Returns querybank normalization with the dynamic inverted softmax (Bogolin et al. 2022): for queries whose
    nearest item of the gallery is the nearest of some query of the bank, the logarithm of the inverted softmax over the
    bank, divided by `scale`; the scores as they are for the others."""
    i2t = _normalize_queries(scores, bank.images, scale)
    return i2t, _normalize_queries(scores.T, bank.captions.T, scale).T


def _normalize_queries(scores, bank, scale: float):
    """Returns the normalized scores of queries (rows) with a gallery (columns), for a bank of queries (rows)."""
    hubs = np.unique(np.argmax(bank, 1))
    is_active = np.isin(np.argmax(scores, 1), hubs)
    return np.where(is_active[:, None], scores - soft_maximum(bank, scale, 0), scores)


def soft_maximum(x, scale: float, axis: int):
    """Returns the log-sum-exp of `scale x` along an axis, which is kept, divided by `scale`."""
    largest = np.max(x, axis, keepdims=True)
    return largest + np.log(np.sum(np.exp(scale * (x - largest)), axis, keepdims=True)) / scale


@dataclasses.dataclass(frozen=True)
class Method:
    """A transductive correction: `compute(scores, bank, strength)`, its default strength (a number of neighbors or an
    inverse temperature), and whether it takes a Bank (else None)."""

    compute: Callable
    strength: float
    needs_bank: bool = False


METHODS = {
    "csls": Method(csls, 10),
    "dual_softmax": Method(dual_softmax, 20.0),
    "querybank": Method(querybank, 20.0, needs_bank=True),
}


def parse_transductive(text: str) -> dict[str, float]:
    """Returns the methods that `--transductive` names, with their strengths: NAME or NAME:STRENGTH, separated by
    commas. Raises ConfigError."""
    chosen = {}
    for word in filter(None, text.split(",")):
        name, has_strength, strength = word.partition(":")
        if name not in METHODS:
            raise ConfigError(f"--transductive: {name!r} is not one of {', '.join(METHODS)}{suggest(name, METHODS)}")
        if name in chosen:
            raise ConfigError(f"--transductive={text}: give {name} once")
        if has_strength and not (re.fullmatch(r"[0-9]+(\.[0-9]+)?", strength) and float(strength) >= 1):
            raise ConfigError(f"--transductive: {word}: give a number of at least 1 after the colon")
        chosen[name] = float(strength) if has_strength else METHODS[name].strength
    return chosen


def needs_bank(chosen: dict[str, float]) -> bool:
    """Returns whether one of the chosen methods takes training images and captions as a bank."""
    return any(METHODS[name].needs_bank for name in chosen)


def correct_scores(
    evaluator: Evaluator, params, images: Features, texts: Features, split: Split, train: Split | None, chosen: dict
) -> dict[str, dict]:
    """Returns the `metrics.retrieval_metrics` of an encoded split after each method of `chosen` (name to strength),
    with its `strength`. `train`: the training split; None if no method takes a bank."""
    scores, bank = score_all(evaluator, params, images, texts), None
    if needs_bank(chosen):
        bank_images, bank_texts = evaluator.encode(params, train.first_images(BANK_IMAGES))
        bank = Bank(score_all(evaluator, params, bank_images, texts), score_all(evaluator, params, images, bank_texts))
    results = {}
    for name, strength in chosen.items():
        i2t, t2i = METHODS[name].compute(scores, bank, strength)
        counts = (_count_stronger(matrix, split)[side] for side, matrix in enumerate((i2t, t2i)))
        results[name] = metrics.retrieval_metrics(*counts, split.caption_image) | {"strength": strength}
    return results


def score_all(evaluator: Evaluator, params, images: Features, texts: Features) -> np.ndarray:
    """Returns the scores of all pairs of encoded images and captions, float32 `(I, C)`."""
    shape = len(images.mask), len(texts.mask)
    tiled, scores = evaluator.scores(params, images, texts), np.empty(shape, np.float32)
    for rows in even_slices(shape[0], TILE_IMAGES):
        for columns in even_slices(shape[1], TILE_CAPTIONS):
            scores[rows, columns] = tiled(rows, columns)
    return scores


def _count_stronger(scores, split: Split):
    """Returns the counts `(n_i2t, n_t2i)` of docs/method.md, Eqs. 56 and 57."""
    return rank(lambda rows, columns: scores[rows, columns], split.caption_image).counts[1]
