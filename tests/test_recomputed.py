"""Scores in tiles, computed again in the backward pass, are the scores, and their gradients the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.features import Features, make_features
from mefn_jax.model import MODELS
from mefn_jax.scoring.ring import score_in_tiles, texts_per_tile

B, T, N, M, D = 5, 6, 4, 3, 8


def features(seed):
    rng = np.random.default_rng(seed)
    words = np.arange(M) < rng.integers(1, M + 1, (T, 1))
    images = make_features(
        jnp.asarray(rng.normal(size=(B, N, D)), jnp.float32), jnp.ones((B, N), bool), jnp.ones((B, D))
    )
    texts = jnp.asarray(rng.normal(size=(T, M, D)), jnp.float32)
    return images, make_features(texts, jnp.asarray(words), texts.sum(1), {"ids": jnp.arange(T)})


@pytest.mark.parametrize("name", ["mefn", "scan_t2i_lse", "vsepp"])
def test_tiles_change_neither_scores_nor_gradients(name):
    matcher, options = MODELS[name]
    matcher = matcher(**options)
    images, texts = features(0)
    params = matcher.init(jax.random.key(0), images, texts)

    def loss(params, v, t, mib):
        given_images = Features(v, images.mask, images.pooled)
        given_texts = Features(t, texts.mask, texts.pooled, texts.extra)
        scores = score_in_tiles(lambda a, b: matcher.apply(params, a, b), given_images, given_texts, mib)
        return jnp.sum(jnp.sin(3 * scores + jnp.arange(B * T).reshape(B, T))), scores

    plain, tiled = (
        jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)(
            params, images.fragments, texts.fragments, mib
        )
        for mib in (128.0, 2 * 4 * B * N * M / 2**20)
    )
    assert tiled[0][1].shape == (B, T)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, tiled)


def test_blocks_of_one_tile_exist_at_a_time():
    sizes = []

    def score(images, texts):
        sizes.append(texts.mask.shape[0])
        assert texts.extra["ids"].shape == (sizes[-1],)
        return jnp.zeros((B, sizes[-1]))

    images, texts = features(0)
    for fit in (1, 2, 3, 5, 6, 99):
        assert score_in_tiles(score, images, texts, fit * 4 * B * N * M / 2**20).shape == (B, T)
    assert [sizes[0], *sizes[-5:]] == [1, 2, 3, 3, 6, 6]


@given(st.integers(1, 999), st.integers(1, 300), st.integers(1, 40), st.floats(1e-6, 200))
@settings(deadline=None)
def test_a_tile_divides_the_texts_and_fits(regions, number, words, mib):
    tile = texts_per_tile(regions, (number, words), mib)
    assert number % tile == 0
    assert tile == 1 or tile * 4 * regions * words <= mib * 2**20
    larger = [k for k in range(tile + 1, number + 1) if number % k == 0]
    assert all(k * 4 * regions * words > mib * 2**20 for k in larger)
