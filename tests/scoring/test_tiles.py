"""Scores computed in tiles of packed captions against scores of all pairs at once."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_features import masks, random_features
from systems import SCORES, make_matcher, projections_of

from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring.tiles import TiledScores, compile_tile_scorer, even_slices, plan_tiles

N, M, D = 4, 7, 6


@pytest.fixture(scope="module")
def scorers():
    """A mesh of one device; and every matcher's parameters, its compiled tile, and its compiled scores of all pairs."""
    mesh, scorers = make_mesh(devices=jax.devices()[:1]), {}
    examples = random_features(0, 2, N, D), random_features(1, 2, M, D)
    for name in SCORES:
        module = make_matcher(name)
        params = module.init(jax.random.key(0), *examples)

        tile = functools.partial(module.apply, method="score_tile")
        scorer = compile_tile_scorer(tile, module.uses_pooled_products, mesh, 1.0, projections_of(module))
        scorers[name] = params, scorer, jax.jit(module.apply)
    return mesh, scorers


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), masks(5, N), masks(9, M), st.sampled_from(["", "items"]))
def test_tiled_scores_equal_untiled_scores(scorers, seed, region_mask, word_mask, repeat):
    mesh, scorers = scorers
    images = random_features(seed, 5, N, D, region_mask, repeat=repeat)
    texts = random_features(seed + 1, 9, M, D, word_mask, repeat=repeat)
    for name, (params, score_tile, score_all) in scorers.items():
        scores = TiledScores(lambda *x, s=score_tile, p=params: s(p, *x), images, texts, mesh)
        expected = np.asarray(score_all(params, images, texts))
        np.testing.assert_allclose(scores(slice(0, 5), slice(0, 9)), expected, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(scores(slice(1, 4), slice(2, 9)), expected[1:4, 2:9], atol=1e-5, err_msg=name)


def test_plan_tiles_keeps_memory_budget():
    assert plan_tiles(250, 36, 128, 1.0) == (5, 50)
    assert plan_tiles(3, 10_000, 128, 1.0) == (3, 1)
    assert even_slices(1000, 256) == [slice(0, 250), slice(250, 500), slice(500, 750), slice(750, 1000)]
