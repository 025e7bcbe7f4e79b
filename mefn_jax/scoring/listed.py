"""Scores of listed pairs, from scores that come a tile at a time. P pairs."""

from collections.abc import Iterator

import numpy as np

from mefn_jax.scoring.ranking import check_finite
from mefn_jax.scoring.tiles import TILE_CAPTIONS, TILE_IMAGES, Scores, even_slices


def score_listed_pairs(scores: Scores, images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """Returns the scores of image `images[p]` with caption `captions[p]`, float32 `(P,)`.

    Only tiles that hold listed pairs are scored: few, if captions stand in the order of their images. Raises
    TrainingError for a score that is not finite.
    """
    result = np.empty(len(images), np.float32)
    for rows, columns, pairs in cut_into_tiles(images, captions):
        tile = scores(rows, columns)
        of_pairs = tile[images[pairs] - rows.start, captions[pairs] - columns.start]
        if not np.all(np.isfinite(of_pairs)):  # pairs that are not listed do not count
            check_finite(tile, rows, columns)
        result[pairs] = of_pairs
    return result


def cut_into_tiles(images: np.ndarray, captions: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yields ranges of images and of captions that together hold all pairs, of the size of a tile at most, and which
    pairs each holds, int64."""
    if not len(images):
        return
    order = np.lexsort((captions, images))
    for rows in even_slices(int(images.max()) + 1, TILE_IMAGES):
        start, stop = np.searchsorted(images[order], (rows.start, rows.stop))
        pairs = order[start:stop]
        pairs = pairs[np.argsort(captions[pairs], kind="stable")]
        while len(pairs):
            first = int(captions[pairs[0]])
            inside = int(np.searchsorted(captions[pairs], first + TILE_CAPTIONS))
            yield rows, slice(first, int(captions[pairs[inside - 1]]) + 1), pairs[:inside]
            pairs = pairs[inside:]
