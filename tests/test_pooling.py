"""Pooling, the GRU and the projection of precomputed regions, each against a naive loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mefn_jax.encoders.gru import GRU
from mefn_jax.encoders.pooling import POOLINGS, PlaceWeights, Pool
from mefn_jax.encoders.regions import PROJECTIONS, RegionEncoder

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
            weights = np.asarray(PlaceWeights().apply(places, np.array([len(there)]), 5))[0]
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
    module = PlaceWeights()
    params = module.init(jax.random.key(1), np.array([1]), 5)

    def weights_of(number, length):
        return np.asarray(module.apply(params, np.array([number]), length))[0]

    for number in (1, 3, 5):
        weights = weights_of(number, 5)
        assert weights.sum() == pytest.approx(1, abs=1e-6)
        assert np.all(weights[number:] == 0)
    assert np.abs(weights_of(5, 5)[:3] - weights_of(3, 5)[:3]).max() > 1e-3  # they depend on the number
    np.testing.assert_allclose(weights_of(3, 9)[:3], weights_of(3, 5)[:3], atol=1e-6)  # and not on padding


IDS = np.array([[5, 3, 7, 2, 8], [4, 6, 1, 0, 0], [9, 0, 0, 0, 0]], np.int32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def naive_direction(p, x):
    h, states = np.zeros(p["hn"]["kernel"].shape[0]), []
    for step in x:
        dense = {n: step @ p[f"i{n}"]["kernel"] + p[f"i{n}"]["bias"] for n in "rzn"}
        r, z = (sigmoid(dense[n] + h @ p[f"h{n}"]["kernel"]) for n in "rz")
        n = np.tanh(dense["n"] + r * (h @ p["hn"]["kernel"] + p["hn"]["bias"]))
        h = (1 - z) * n + z * h
        states.append(h)
    return np.array(states)


@pytest.mark.parametrize(("layers", "bidirectional"), [(1, True), (2, True), (1, False)])
def test_gru_is_the_naive_loop(layers, bidirectional):
    module = GRU(10, 4, word_width=3, layers=layers, bidirectional=bidirectional)
    mask = IDS > 0
    params = jax.tree.map(np.asarray, module.init(jax.random.key(0), IDS, mask))
    hidden, pooled = module.apply(params, IDS, mask)
    p = params["params"]
    assert np.abs(p["words"]["embedding"]).max() <= 0.1
    for row, ids in enumerate(IDS):
        x = p["words"]["embedding"][ids[ids > 0]]
        for k in range(layers):
            states = [naive_direction(p[f"layer_{k}_forward"], x)]
            last = [states[0][-1]]
            if bidirectional:
                states.append(naive_direction(p[f"layer_{k}_backward"], x[::-1])[::-1])
                last.append(states[1][0])
            x = np.concatenate(states, -1)
        np.testing.assert_allclose(hidden[row, : len(x)], np.mean(states, 0), atol=1e-5)
        assert np.all(hidden[row, len(x) :] == 0)
        np.testing.assert_allclose(pooled[row], np.mean(last, 0), atol=1e-5)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_regions_become_features(projection):
    module = RegionEncoder(8, projection, "gpo")
    params = module.init(jax.random.key(0), X, MASK)
    found = module.apply(params, X, MASK)
    assert found.fragments.shape == (4, 5, 8)
    np.testing.assert_allclose(np.linalg.norm(found.fragments, axis=-1), MASK, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.pooled, axis=-1), MASK.any(1), atol=1e-5)
    alone = module.apply(params, X[1:2], MASK[1:2])
    np.testing.assert_allclose(alone.pooled, found.pooled[1:2], atol=1e-5)
    p = jax.tree.map(np.asarray, params["params"])
    expected = X[0] @ p["regions"]["kernel"] + p["regions"]["bias"]
    if projection == "mlp":
        y = X[0] @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"]
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        y = np.maximum(y * p["mlp_norm"]["scale"] + p["mlp_norm"]["bias"], 0)
        expected = expected + y @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(found.fragments[0], expected, atol=1e-5)


def test_what_stands_at_padded_places_does_not_matter():
    module = RegionEncoder(8, "mlp", "max")
    params = module.init(jax.random.key(0), X, MASK)
    found = module.apply(params, X, MASK)
    other = module.apply(params, np.where(MASK[..., None], X, np.nan), MASK)
    jax.tree.map(np.testing.assert_array_equal, other, found)


def test_a_text_without_tokens_is_zero():
    module = GRU(10, 4, word_width=3)
    empty = np.zeros((1, 3), np.int32)
    (hidden, pooled), _ = module.init_with_output(jax.random.key(0), empty, empty > 0)
    assert np.all(hidden == 0)
    assert np.all(pooled == 0)
