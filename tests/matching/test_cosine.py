"""The cosine of pooled embeddings (VSE++)."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_features import masks, random_features

from mefn_jax.matching.cosine import PooledCosine

N, M, D = 4, 5, 6


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), masks(3, N), masks(3, M))
def test_pooled_cosine_ignores_masks(seed, region_mask, word_mask):
    images, texts = random_features(seed, 3, N, D, region_mask), random_features(seed + 1, 3, M, D, word_mask)
    scores = PooledCosine().apply({}, images, texts)
    for i, t in itertools.product(range(3), repeat=2):
        v, u = np.asarray(images.pooled[i], np.float64), np.asarray(texts.pooled[t], np.float64)
        assert float(scores[i, t]) == pytest.approx(v @ u / np.linalg.norm(v) / np.linalg.norm(u), abs=1e-5)
