"""Hubs and collapse: how often the same few results answer, and how much the embeddings use of their space.

Q queries, N candidates, k results of each query, D dimensions.
"""

import numpy as np

COMMONEST = 10  # results whose share of all first answers is counted


def count_occurrences(top: np.ndarray, candidates: int) -> np.ndarray:
    """Counts how often each candidate is among the first k results of a query, its k-occurrence, int64 `(N,)`. `top` is
    `(Q, k)`, -1 where a query has fewer results."""
    return np.bincount(top[top >= 0], minlength=candidates)


def skewness(values: np.ndarray) -> float:
    """Computes the skewness of a distribution: the third central moment over the cube of the standard deviation; 0 if
    all values are equal. Above 1.4, k-occurrences are called strongly hubby (Feldbauer and Flexer 2019)."""
    centered = values - np.mean(values)
    deviation = np.sqrt(np.mean(centered**2))
    return float(np.mean(centered**3) / deviation**3) if deviation > 0 else 0.0


def skewness_by_chance(queries: int, candidates: int, k: int) -> float:
    """Returns the skewness of the k-occurrence of candidates in random orders: that of a binomial distribution."""
    share = min(1.0, k / candidates)
    deviation = np.sqrt(queries * share * (1 - share))
    return float((1 - 2 * share) / deviation) if deviation > 0 else 0.0


def is_first_commonest(first: np.ndarray, candidates: int) -> np.ndarray:
    """Returns for each query whether its first result, `first (Q,)`, is one of the COMMONEST most common ones, bool
    `(Q,)`."""
    occurrences = np.bincount(first, minlength=candidates)
    commonest = np.argsort(-occurrences, kind="stable")[:COMMONEST]
    return np.isin(first, commonest)


def mean_cosine(vectors: np.ndarray) -> float:
    """Computes the mean cosine of two different vectors of `(N, D)`, near 1 after a collapse; 0 for one vector."""
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    number = len(units)
    if number < 2:
        return 0.0
    return float((np.sum(units.sum(0, dtype=float) ** 2) - np.sum(units.astype(float) ** 2)) / (number * (number - 1)))


def effective_dimensions(vectors: np.ndarray) -> float:
    """Computes how many dimensions vectors `(N, D)` use: the participation ratio `(sum l)^2 / sum l^2` of the
    eigenvalues l of their covariance; 0 if all vectors are equal."""
    centered = vectors.astype(float) - vectors.mean(0, dtype=float)
    covariance = centered.T @ centered / len(vectors)
    total, squares = np.trace(covariance), np.sum(covariance**2)
    return float(total**2 / squares) if squares > 1e-24 else 0.0
