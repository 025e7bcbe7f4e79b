"""Precomputed regions: what is pooled of them, and GPO's place weights from their parameters by a naive loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mefn_jax.encoders.pooling import PlaceWeights, Pool
from mefn_jax.encoders.positions import sines
from mefn_jax.encoders.regions import PROJECTIONS, RegionEncoder

RNG = np.random.default_rng(0)
REGIONS = RNG.normal(size=(3, 4, 6)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]], bool)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def naive_gru(p, x):
    h, states = np.zeros(len(p["hn"]["bias"])), []
    for step in x:
        r, z, n = (step @ p[f"i{gate}"]["kernel"] + p[f"i{gate}"]["bias"] for gate in "rzn")
        r, z = sigmoid(r + h @ p["hr"]["kernel"]), sigmoid(z + h @ p["hz"]["kernel"])
        n = np.tanh(n + r * (h @ p["hn"]["kernel"] + p["hn"]["bias"]))
        h = (1 - z) * n + z * h
        states.append(h)
    return np.array(states)


def test_place_weights_are_the_naive_loop():
    module, numbers = PlaceWeights(), np.array([4, 3, 1])
    params = jax.tree.map(np.asarray, module.init(jax.random.key(0), numbers, 4))
    found, p = module.apply(params, numbers, 4), params["params"]
    assert p["weight"]["kernel"].shape == (32, 1)
    for number, weights in zip(numbers, found, strict=True):
        codes = np.asarray(sines(np.arange(number), 32))
        states = (naive_gru(p["gru_forward"], codes) + naive_gru(p["gru_backward"], codes[::-1])[::-1]) / 2
        powers = np.exp((states @ p["weight"]["kernel"])[:, 0] / 0.1)  # 0.1: the paper's temperature
        np.testing.assert_allclose(weights[:number], powers / powers.sum(), atol=1e-5)


def raw(p, regions):
    """The projected regions before they get unit length."""
    x = dense(p["regions"], regions)
    if "mlp_in" in p:
        y = dense(p["mlp_in"], regions)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        x = x + dense(p["mlp_out"], np.maximum(y * p["mlp_norm"]["scale"] + p["mlp_norm"]["bias"], 0))
    return x


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


@pytest.mark.parametrize(
    ("projection", "pooling"), [*((p, "mean") for p in PROJECTIONS), ("mlp", "max"), ("mlp", "gpo")]
)
def test_pooled_is_of_the_projected_regions_as_they_are(projection, pooling):
    module = RegionEncoder(8, projection, pooling)
    params = jax.tree.map(np.asarray, module.init(jax.random.key(0), REGIONS, MASK))["params"]
    found = module.apply({"params": params}, REGIONS, MASK)
    if projection == "mlp":
        assert params["mlp_in"]["kernel"].shape == (6, 4)  # D / 2, as in VSE-infinity
    pool = {"params": params["pooling"]} if "pooling" in params else {}
    pooled = Pool(pooling).apply(pool, raw(params, REGIONS), MASK)
    np.testing.assert_allclose(found.pooled, pooled / np.linalg.norm(pooled, axis=-1, keepdims=True), atol=1e-5)


def test_masked_regions_have_no_effect_and_gradients_are_finite():
    module = RegionEncoder(8, "mlp", "gpo")
    params = module.init(jax.random.key(0), REGIONS, MASK)

    def run(params, regions):
        found = module.apply(params, regions, MASK)
        return jnp.sum(found.fragments[..., 0]) + jnp.sum(found.pooled[:, 0]), found

    step = jax.jit(jax.value_and_grad(run, has_aux=True))
    (_, found), grads = step(params, REGIONS)
    other = step(params, np.where(MASK[..., None], REGIONS, 7.0).astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, other[0][1], found)
    assert np.all(np.asarray(found.fragments)[~MASK] == 0)
    for a, b in zip(jax.tree.leaves(other[1]), jax.tree.leaves(grads), strict=True):
        assert np.all(np.isfinite(b))
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert all(np.any(grads["params"][name]["kernel"]) for name in ("regions", "mlp_in", "mlp_out"))
