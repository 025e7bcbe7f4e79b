"""Scores computed in tiles of packed captions against scores of all pairs at once."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_features import length_mask, masks, random_features
from systems import SCORES, make_matcher, projections_of

from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring.tiles import TiledScores, compile_pair_scorer, compile_tile_scorer, even_slices, plan_tiles

N, M, D = 4, 7, 6
METHODS = ("score_tile", "prepare_images", "prepare_texts", "score_pairs")


@pytest.fixture(scope="module")
def scorers():
    """A mesh of one device; and every matcher's parameters, its compiled tile, and its compiled scores of all pairs."""
    mesh, scorers = make_mesh(devices=jax.devices()[:1]), {}
    examples = random_features(0, 2, N, D), random_features(1, 2, M, D)
    for name in SCORES:
        module = make_matcher(name)
        params = module.init(jax.random.key(0), *examples)

        apply = {name: functools.partial(module.apply, method=name) for name in METHODS}
        if module.defines("score_pairs"):
            few_pairs = 7 * 4 * module.floats_per_pair(*examples) / 2**20  # MiB
            prepare = apply["prepare_images"], apply["prepare_texts"]
            scorer = compile_pair_scorer(prepare, apply["score_pairs"], module.floats_per_pair, mesh, few_pairs)
        else:
            with_pooled, project = module.uses_pooled_products, projections_of(module)
            scorer = compile_tile_scorer(apply["score_tile"], with_pooled, mesh, 1.0, project)
        scorers[name] = params, scorer, jax.jit(module.apply), (3, 4) if module.defines("score_pairs") else None
    return mesh, scorers


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), masks(5, N), masks(9, M), st.sampled_from(["", "items"]))
def test_tiled_scores_equal_untiled_scores(scorers, seed, region_mask, word_mask, repeat):
    mesh, scorers = scorers
    images = random_features(seed, 5, N, D, region_mask, repeat=repeat)
    texts = random_features(seed + 1, 9, M, D, word_mask, repeat=repeat)
    for name, (params, score_tile, score_all, block) in scorers.items():
        scores = TiledScores(lambda *x, s=score_tile, p=params: s(p, *x), images, texts, mesh, block)
        expected = np.asarray(score_all(params, images, texts))
        np.testing.assert_allclose(scores(slice(0, 5), slice(0, 9)), expected, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(scores(slice(1, 4), slice(2, 9)), expected[1:4, 2:9], atol=1e-5, err_msg=name)


def test_plan_tiles_keeps_memory_budget():
    assert plan_tiles(250, 36, 128, 1.0) == (5, 50)
    assert plan_tiles(3, 10_000, 128, 1.0) == (3, 1)
    assert even_slices(1000, 256) == [slice(0, 250), slice(250, 500), slice(500, 750), slice(750, 1000)]


def test_scores_of_a_pair_do_not_depend_on_other_items(scorers):
    """Of every system: a part of a gallery, in another order and among other items, has the same scores."""
    sides = []
    for seed, count, size, kept in ((0, 5, N, [3, 1]), (1, 9, M, [8, 0, 2, 5])):
        mask = length_mask(seed, count, size)
        gallery, other = (random_features(seed + 10 * k, count, size, D, mask) for k in range(2))
        mixed = jax.tree.map(lambda a, b, kept=kept: np.concatenate([a[kept], b[len(kept) :]]), gallery, other)
        sides.append((gallery, mixed, kept))
    (images, mixed_images, rows), (texts, mixed_texts, columns) = sides
    for name, (params, _, score_all, _) in scorers[1].items():
        expected = np.asarray(score_all(params, images, texts))[np.ix_(rows, columns)]
        found = np.asarray(score_all(params, mixed_images, mixed_texts))[: len(rows), : len(columns)]
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=name)


def test_scores_do_not_depend_on_padding(scorers):
    """Of every system: further masked fragments and further empty items change nothing, and have finite scores."""
    images, texts = (
        random_features(seed, number, size, D, length_mask(seed, number, size))
        for seed, number, size in ((30, 3, N - 1), (31, 6, M - 2))
    )

    def pad(features, items, fragments):
        filled = features.replace(
            fragments=np.pad(features.fragments, ((0, 0), (0, fragments), (0, 0))),
            mask=np.pad(features.mask, ((0, 0), (0, fragments))),
        )
        return jax.tree.map(lambda x: np.pad(x, [(0, items)] + [(0, 0)] * (x.ndim - 1)), filled)

    for name, (params, _, score_all, _) in scorers[1].items():
        expected = np.asarray(score_all(params, images, texts))
        found = np.asarray(score_all(params, pad(images, 2, 1), pad(texts, 3, 2)))
        np.testing.assert_allclose(found[:3, :6], expected, atol=1e-6, err_msg=name)
        assert np.all(np.isfinite(found)), name


def test_unrelated_items_rank_at_chance(scorers):
    """Of every system, with random parameters: in a gallery of random images and captions, the caption of an image's
    own number ranks as any other. Scores are computed in parts, in which an image meets its caption at all places."""
    rows, columns = 5, 9
    size = rows * columns
    images = random_features(20, size, N, D)
    texts = random_features(21, size, M, D, length_mask(22, size, M))
    parts = [
        [jax.tree.map(lambda x, k=k, n=n: x[k : k + n], side) for k in range(0, size, n)]
        for side, n in ((images, rows), (texts, columns))
    ]
    for name, (params, _, score_all, _) in scorers[1].items():
        scores = np.block([[np.asarray(score_all(params, v, t)) for t in parts[1]] for v in parts[0]])
        for matrix in (scores, scores.T):
            ranks = np.sum(matrix > np.diagonal(matrix)[:, None], 1)
            # The mean of 45 uniform ranks from 0 to 44: 22, with a standard deviation of 1.94.
            assert abs(ranks.mean() - 22) < 4 * 1.94, name
            assert np.sum(ranks == 0) < 8, name  # 1 is expected; 8 or more have a probability of 1e-5
