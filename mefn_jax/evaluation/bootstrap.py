"""Bootstrap: how often each unit (an image with its captions) is drawn in each resample (docs/method.md, Eq. 66).

G units, R resamples.
"""

from collections.abc import Iterator

import numpy as np

RESAMPLES = 10_000
BOUNDS = (2.5, 97.5)  # percentiles of a 95 % interval


def draw_resamples(
    units: int, resamples: int = RESAMPLES, seed: int = 0, at_once: int | None = None
) -> Iterator[np.ndarray]:
    """Yields how often each unit is drawn, float64 `(R, G)`, in blocks of at most `at_once` resamples, by default as
    one.

    The draws follow from the seed alone, so systems that are resampled with one seed see the same resamples (paired
    bootstrap), whatever the blocks.
    """
    rng, shares, at_once = np.random.default_rng(seed), np.full(units, 1 / units), at_once or resamples
    for start in range(0, resamples, at_once):
        yield rng.multinomial(units, shares, min(at_once, resamples - start)).astype(float)


def draw_shares(number: int, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Draws from the `number` seeds of a row and returns the share of each in each resample, `(R, number)`."""
    return rng.multinomial(number, np.full(number, 1 / number), resamples) / number


def percentile_bounds(values: np.ndarray) -> np.ndarray:
    """Returns the bounds of the 95 % interval of resampled values `(R, ...)`, `(2, ...)`."""
    return np.percentile(values, BOUNDS, axis=0)
