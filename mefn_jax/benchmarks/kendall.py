"""Kendall's tau-b and tau-c of scores with human ratings, of weighted pairs, for many weights at once.

P pairs of an image and a caption, each with a score and with J single judgements; L rating levels; R sets of weights. A
judgement is an observation: the J judgements of a pair share its score. Weighted by w, a pair counts as w pairs that
are tied in score.
"""

import dataclasses

import numpy as np

PAIRS_AT_ONCE = 2**22  # numbers in an array of sets of weights by pairs by rating levels


@dataclasses.dataclass(frozen=True)
class Judgements:
    """Judgements in the order of the scores.

    Attributes:
        counts: float64 `(P, L)`, how many judgements of each level each pair has; levels rise.
        starts: int64 `(S,)`, the first pair of each group of pairs that are tied in score; scores rise.
        order: int64 `(P,)`, the position of each of these pairs in the arguments of `sort_judgements`.
    """

    counts: np.ndarray
    starts: np.ndarray
    order: np.ndarray


def sort_judgements(scores: np.ndarray, ratings: np.ndarray) -> Judgements:
    """Returns the judgements of pairs with `scores (P,)` and `ratings (P, J)`, where NaN stands for no judgement."""
    order = np.argsort(scores, kind="stable")
    levels = np.unique(ratings[~np.isnan(ratings)])
    counts = np.sum(ratings[order, :, None] == levels, axis=1).astype(float)  # (P, L)
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    return Judgements(counts, starts, order)


def kendall_tau(judgements: Judgements, weights: np.ndarray, variant: str) -> np.ndarray:
    """Computes tau-b or tau-c for each set of `weights (R, P)`, float64 `(R,)`; NaN where it is undefined, because all
    scores or all ratings are equal.

    With C concordant and D discordant pairs of judgements among n, `tau_b = (C - D) / sqrt((n0 - n1) (n0 - n2))`, where
    n0 are all pairs and n1, n2 those tied in score, in rating (Kendall 1945), and `tau_c = 2 (C - D) / (n^2 (m - 1) /
    m)`, where m is the smaller number of different values (Stuart 1953).
    """
    at_once = max(1, PAIRS_AT_ONCE // judgements.counts.size)
    blocks = (weights[k : k + at_once] for k in range(0, len(weights), at_once))
    return np.concatenate([_tau_of_block(judgements, block[:, judgements.order], variant) for block in blocks])


def _tau_of_block(judgements: Judgements, weights: np.ndarray, variant: str) -> np.ndarray:
    """Computes tau for a block of weights `(R, P)`, in the order of the scores."""
    table = np.add.reduceat(weights[..., None] * judgements.counts, judgements.starts, axis=1)  # (R, S, L)
    lower_scores = np.cumsum(table, 1) - table
    lower_ratings = np.cumsum(lower_scores, 2) - lower_scores
    higher_ratings = np.sum(lower_scores, 2, keepdims=True) - lower_ratings - lower_scores
    difference = np.sum(table * (lower_ratings - higher_ratings), (1, 2))  # C - D
    by_score, by_rating, total = table.sum(2), table.sum(1), table.sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        if variant == "tau_b":
            untied = [_count_pairs(total) - np.sum(_count_pairs(x), 1) for x in (by_score, by_rating)]
            tau = difference / np.sqrt(untied[0] * untied[1])
        else:
            different = np.minimum(np.sum(by_score > 0, 1), np.sum(by_rating > 0, 1))
            tau = 2 * difference / (total**2 * (different - 1) / different)
    has_order = (np.sum(by_score > 0, 1) > 1) & (np.sum(by_rating > 0, 1) > 1)
    return np.where(has_order, tau, np.nan)


def _count_pairs(number: np.ndarray) -> np.ndarray:
    """Returns the number of pairs among `number` observations."""
    return number * (number - 1) / 2
