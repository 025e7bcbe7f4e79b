"""Pooling of fragments against naive loops, and its invariants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerical_gradient import check_gradient
from reference_gru import naive_gru

from mefn_jax.encoders.gru import GRU
from mefn_jax.encoders.image import ImageEncoder
from mefn_jax.encoders.pooling import POOLINGS, GPOWeights, Pool, mean_pool
from mefn_jax.encoders.positions import sines
from mefn_jax.encoders.text import TextEncoder
from mefn_jax.encoders.vit import ViT

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 5, 6)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)


@pytest.mark.parametrize("kind", POOLINGS)
def test_pool_equals_naive_loop(kind):
    module = Pool(kind)
    params = jax.tree.map(lambda x: x + 0.1, module.init(jax.random.key(1), X, MASK))  # biases begin at 0
    found = module.apply(params, X, MASK)
    for row, mask, pooled in zip(X, MASK, found, strict=True):
        existing = row[mask]
        if not len(existing):
            expected = np.zeros(6)
        elif kind == "gpo":
            ranked = np.sort(existing, axis=0)[::-1]
            places = {"params": params["params"]["gpo"]["places"]}
            weights = np.asarray(GPOWeights().apply(places, np.array([len(existing)]), 5))[0]
            expected = weights[: len(existing)] @ ranked
        elif kind == "esa":
            attention = params["params"]["esa"]["attention"]
            weights = np.exp([attention["kernel"].T @ x + attention["bias"] for x in existing])  # of each dimension
            expected = np.array([np.sum(w * x) / np.sum(w) for w, x in zip(weights.T, existing.T, strict=True)])
        else:
            expected = existing.mean(0) if kind == "mean" else existing.max(0)
        np.testing.assert_allclose(pooled, expected, atol=1e-6)


@pytest.mark.parametrize("kind", POOLINGS)
def test_pool_ignores_order_and_padding_with_finite_gradients(kind):
    module = Pool(kind)
    params = module.init(jax.random.key(1), X, MASK)
    found = module.apply(params, X, MASK)
    order = RNG.permutation(5)
    np.testing.assert_allclose(module.apply(params, X[:, order], MASK[:, order]), found, atol=1e-6)
    other = np.where(MASK[..., None], X, 1e9)
    np.testing.assert_allclose(module.apply(params, other, MASK), found, atol=1e-6)
    inside = np.where(MASK[..., None], X, np.nan)[:3]
    assert np.all(found[:3] <= np.nanmax(inside, 1) + 1e-6)
    assert np.all(found[:3] >= np.nanmin(inside, 1) - 1e-6)
    grads = jax.grad(lambda p, x: jnp.sum(module.apply(p, x, MASK) ** 2), (0, 1))(params, X)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert np.all(np.asarray(grads[1])[~MASK] == 0)


def esa_by_loops(params, x, mask):
    """ESA in float64, dimension by dimension; 0 for an item without fragments."""
    attention, pooled = params["params"]["esa"]["attention"], np.zeros((len(x), x.shape[2]))
    for item, exists, row in zip(x, mask, pooled, strict=True):
        for d in range(x.shape[2]) if exists.any() else ():
            logits = np.array([fragment @ attention["kernel"][:, d] for fragment in item[exists]])
            weights = np.exp(logits - logits.max())  # the bias is the same for all fragments: it cancels
            row[d] = weights @ item[exists, d] / weights.sum()
    return pooled


@functools.cache
def esa_with_gradient():
    def total(inputs, mask):
        pooled = Pool("esa").apply(*inputs, mask)
        return jnp.sum(jnp.sin(pooled)), pooled

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=3, max_size=3))
def test_esa_equals_loops_with_gradients_for_any_masks(seed, mask):
    """The examples include one fragment, and none."""
    rng, mask = np.random.default_rng(seed), np.array(mask)
    attention = {"kernel": rng.normal(size=(5, 5)), "bias": rng.normal(size=5)}
    inputs = {"params": {"esa": {"attention": attention}}}, rng.normal(size=(3, 4, 5))
    inputs = jax.tree.map(np.float32, inputs)
    (_, pooled), gradient = esa_with_gradient()(inputs, mask)
    np.testing.assert_allclose(pooled, esa_by_loops(*inputs, mask), atol=1e-5)
    check_gradient(lambda inputs: np.sum(np.sin(esa_by_loops(*inputs, mask))), inputs, gradient, seed)


def test_esa_of_one_fragment_or_without_map_is_mean():
    module = Pool("esa")
    params = module.init(jax.random.key(1), X, MASK)
    np.testing.assert_allclose(module.apply(params, X, MASK)[2], X[2, 0], rtol=1e-6)
    zeros = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_allclose(module.apply(zeros, X, MASK), mean_pool(X, MASK), atol=1e-6)


def test_gpo_weights_sum_to_one_over_existing_fragments():
    module = GPOWeights()
    params = module.init(jax.random.key(1), np.array([1]), 5)

    def gpo_weights(number, length):
        return np.asarray(module.apply(params, np.array([number]), length))[0]

    for number in (1, 3, 5):
        weights = gpo_weights(number, 5)
        assert weights.sum() == pytest.approx(1, abs=1e-6)
        assert np.all(weights[number:] == 0)
    assert np.abs(gpo_weights(5, 5)[:3] - gpo_weights(3, 5)[:3]).max() > 1e-3  # they depend on the number of fragments
    np.testing.assert_allclose(gpo_weights(3, 9)[:3], gpo_weights(3, 5)[:3], atol=1e-6)  # but not on padding


def test_gpo_weights_equal_naive_loop():
    module, numbers = GPOWeights(), np.array([4, 3, 1])
    params = jax.tree.map(np.asarray, module.init(jax.random.key(0), numbers, 4))
    found, p = module.apply(params, numbers, 4), params["params"]
    assert p["weight"]["kernel"].shape == (32, 1)
    for number, weights in zip(numbers, found, strict=True):
        codes = np.asarray(sines(np.arange(number), 32))
        states = (naive_gru(p["gru_forward"], codes) + naive_gru(p["gru_backward"], codes[::-1])[::-1]) / 2
        powers = np.exp((states @ p["weight"]["kernel"])[:, 0] / 0.1)  # 0.1 is the paper's temperature
        np.testing.assert_allclose(weights[:number], powers / powers.sum(), atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "gpo"])
def test_encoders_pool_their_fragments(pooling):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    module = ImageEncoder(
        ViT(width=16, layers=1, heads=2, mlp_width=32, patch=8), 12, (2,), (0.5,) * 3, (0.25,) * 3, pooling
    )
    found, params = module.init_with_output(jax.random.key(0), pixels)
    assert "pooled" not in params["params"]
    np.testing.assert_allclose(np.linalg.norm(found.pooled, axis=-1), 1, rtol=1e-5)
    ids = np.array([[2, 5, 6, 3, 0]], np.int32)
    text = TextEncoder(GRU(20, 12, word_width=4), 0, pooling)
    found, params = text.init_with_output(jax.random.key(0), ids, ids > 0)
    assert set(params["params"]) == {"backbone"} | ({"pooling"} if pooling == "gpo" else set())
    np.testing.assert_array_equal(found.mask, [[True, True, False]])
    if pooling == "mean":  # the mean of the states before normalization
        states = GRU(20, 12, word_width=4).apply({"params": params["params"]["backbone"]}, ids, ids > 0)[0]
        mean = states[0, 1:3].mean(0)
        np.testing.assert_allclose(found.pooled[0], mean / np.linalg.norm(mean), atol=1e-6)
