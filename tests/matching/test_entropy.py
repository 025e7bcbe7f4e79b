"""The entropy map: the paper's Figure 2, naive loops, and finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.matching.entropy import ENTROPIES, shannon

COMPILED = {name: jax.jit(entropy.pair) for name, entropy in ENTROPIES.items()}


def test_shannon_reproduces_figure_2():
    S = np.random.default_rng(0).uniform(-0.02, 0.02, (8, 10)).astype(np.float32)
    cells = np.asarray(shannon(S, jnp.ones(8, bool), jnp.ones(10, bool), 1.0)[0])
    assert cells.min() >= 0.2265
    assert cells.max() <= 0.2336
    assert cells.max() - cells.min() >= 0.005
    equal = np.asarray(shannon(jnp.zeros((8, 10)), jnp.ones(8, bool), jnp.ones(10, bool), 1.0)[0])
    np.testing.assert_allclose(equal, -0.1 * np.log(0.1), rtol=1e-6)
    assert len(np.unique(equal)) == 1


def naive_shannon(S, regions, words, scale):
    """H (N, M), and the normalized entropies of regions and of words, by loops over the existing fragments."""
    H, H_v, H_t = np.zeros(S.shape), np.zeros(S.shape[0]), np.zeros(S.shape[1])
    for i in regions:
        z = sum(np.exp(scale * S[i, k]) for k in words)
        for j in words:
            p = np.exp(scale * S[i, j]) / z
            H[i, j] = -p * np.log(p)
        H_v[i] = sum(H[i]) / np.log(len(words)) if len(words) > 1 else 1.0
    for j in words:
        q = np.array([np.exp(scale * S[k, j]) for k in regions])
        q /= q.sum()
        H_t[j] = -sum(q * np.log(q)) / np.log(len(regions)) if len(regions) > 1 else 1.0
    return H, H_v, H_t


def naive_gaussian(S, regions, words, scale):
    H, unit = np.zeros(S.shape), np.zeros(S.shape)
    top = np.log(2 * np.pi * np.e)
    bottom = top + np.log(1 - 0.999**2) / 2
    for i in regions:
        for j in words:
            H[i, j] = top + np.log(1 - min(max(S[i, j], 0), 0.999) ** 2) / 2
            unit[i, j] = (H[i, j] - bottom) / (top - bottom)
    return H, unit.sum(1) / len(words), unit.sum(0) / len(regions)


def naive_bernoulli(S, regions, words, scale):
    H = np.zeros(S.shape)
    for i in regions:
        for j in words:
            p = 1 / (1 + np.exp(-scale * S[i, j]))
            H[i, j] = np.log(2) if p <= 0.5 else -(p * np.log(p) + (1 - p) * np.log(1 - p))
    return H, H.sum(1) / len(words) / np.log(2), H.sum(0) / len(regions) / np.log(2)


NAIVE_ENTROPIES = {"shannon": naive_shannon, "gaussian": naive_gaussian, "bernoulli": naive_bernoulli}
mask_rows = st.lists(st.booleans(), min_size=5, max_size=5).filter(any)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    mask_rows,
    mask_rows,
    st.sampled_from([0.5, 4.0]),
    st.sampled_from(sorted(NAIVE_ENTROPIES)),
)
def test_entropy_equals_naive_loop(seed, region_mask, word_mask, scale, name):
    S = np.random.default_rng(seed).uniform(-1, 1, (5, 5)).astype(np.float32)
    region_mask, word_mask = np.array(region_mask), np.array(word_mask)
    H, H_v, H_t = (np.asarray(x) for x in COMPILED[name](S, region_mask, word_mask, scale))
    expected = NAIVE_ENTROPIES[name](S.astype(float), np.flatnonzero(region_mask), np.flatnonzero(word_mask), scale)
    np.testing.assert_allclose(H, expected[0], atol=2e-5)
    np.testing.assert_allclose(H_v[region_mask], expected[1][region_mask], atol=2e-5)
    np.testing.assert_allclose(H_t[word_mask], expected[2][word_mask], atol=2e-5)
    for x in (H_v, H_t):
        assert x.min() >= -1e-5
        assert x.max() <= 1 + 1e-5


@pytest.mark.parametrize("name", sorted(ENTROPIES))
@pytest.mark.parametrize("words", [0, 1, 3])
def test_entropy_gradients_are_finite(name, words):
    S = jnp.ones((3, 4))  # identical fragments: all cosines are 1, all probabilities equal
    word_mask = jnp.arange(4) < words

    def total(S, scale):
        return sum(jnp.sum(x) for x in ENTROPIES[name].pair(S, jnp.array([True, True, False]), word_mask, scale))

    for gradient in jax.tree.leaves(jax.grad(total, argnums=(0, 1))(S, 9.0)):
        assert np.all(np.isfinite(gradient))
