"""Scores of listed pairs equal those of the whole matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.errors import TrainingError
from mefn_jax.scoring import listed
from mefn_jax.scoring.listed import cut_into_tiles, score_listed_pairs


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 50), st.booleans())
def test_listed_scores_equal_matrix(seed, pairs, near_diagonal):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(40, 90)).astype(np.float32)
    images = rng.integers(0, 40, pairs)
    captions = np.minimum(2 * images + rng.integers(0, 3, pairs), 89) if near_diagonal else rng.integers(0, 90, pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listed, "TILE_IMAGES", 8)
        patch.setattr(listed, "TILE_CAPTIONS", 16)
        tiles = list(cut_into_tiles(images, captions))
        scores = score_listed_pairs(lambda rows, columns: matrix[rows, columns], images, captions)
    np.testing.assert_array_equal(scores, matrix[images, captions])
    assert all(r.stop - r.start <= 8 and c.stop - c.start <= 16 for r, c, _ in tiles)
    assert sorted(k for *_, part in tiles for k in part) == list(range(pairs))


def test_listed_scores_that_are_no_numbers_are_refused():
    matrix = np.zeros((3, 4), np.float32)
    matrix[2, 3] = np.inf
    with pytest.raises(TrainingError, match="image 2 and caption 3 is inf"):
        score_listed_pairs(lambda rows, columns: matrix[rows, columns], np.array([0, 2]), np.array([0, 3]))
