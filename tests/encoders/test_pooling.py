"""Pooling against naive loops, and its invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gru import naive_direction

from mefn_jax.encoders.pooling import POOLINGS, GPOWeights, Pool
from mefn_jax.encoders.positions import sines

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 5, 6)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)


@pytest.mark.parametrize("kind", POOLINGS)
def test_pooling_is_the_naive_loop(kind):
    module = Pool(kind)
    params = module.init(jax.random.key(1), X, MASK)
    found = module.apply(params, X, MASK)
    for row, mask, pooled in zip(X, MASK, found, strict=True):
        there = row[mask]
        if not len(there):
            expected = np.zeros(6)
        elif kind == "gpo":
            ranked = np.sort(there, axis=0)[::-1]
            places = {"params": params["params"]["gpo"]["places"]}
            weights = np.asarray(GPOWeights().apply(places, np.array([len(there)]), 5))[0]
            expected = weights[: len(there)] @ ranked
        else:
            expected = there.mean(0) if kind == "mean" else there.max(0)
        np.testing.assert_allclose(pooled, expected, atol=1e-6)


@pytest.mark.parametrize("kind", POOLINGS)
def test_pooling_sees_neither_order_nor_padding_and_has_finite_gradients(kind):
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


def test_gpo_weights_sum_to_one_over_what_exists():
    module = GPOWeights()
    params = module.init(jax.random.key(1), np.array([1]), 5)

    def weights_of(number, length):
        return np.asarray(module.apply(params, np.array([number]), length))[0]

    for number in (1, 3, 5):
        weights = weights_of(number, 5)
        assert weights.sum() == pytest.approx(1, abs=1e-6)
        assert np.all(weights[number:] == 0)
    assert np.abs(weights_of(5, 5)[:3] - weights_of(3, 5)[:3]).max() > 1e-3  # they depend on the number
    np.testing.assert_allclose(weights_of(3, 9)[:3], weights_of(3, 5)[:3], atol=1e-6)  # and not on padding


def test_place_weights_are_the_naive_loop():
    module, numbers = GPOWeights(), np.array([4, 3, 1])
    params = jax.tree.map(np.asarray, module.init(jax.random.key(0), numbers, 4))
    found, p = module.apply(params, numbers, 4), params["params"]
    assert p["weight"]["kernel"].shape == (32, 1)
    for number, weights in zip(numbers, found, strict=True):
        codes = np.asarray(sines(np.arange(number), 32))
        states = (naive_direction(p["gru_forward"], codes) + naive_direction(p["gru_backward"], codes[::-1])[::-1]) / 2
        powers = np.exp((states @ p["weight"]["kernel"])[:, 0] / 0.1)  # 0.1: the paper's temperature
        np.testing.assert_allclose(weights[:number], powers / powers.sum(), atol=1e-5)
