"""Precomputed regions: what is pooled of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mefn_jax.encoders.pooling import Pool
from mefn_jax.encoders.regions import PROJECTIONS, RegionEncoder, region_dropout

RNG = np.random.default_rng(0)
REGIONS = RNG.normal(size=(3, 4, 6)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]], bool)


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
    params = jax.tree.map(np.asarray, module.init(jax.random.key(0), REGIONS, mask=MASK))["params"]
    found = module.apply({"params": params}, REGIONS, mask=MASK)
    if projection == "mlp":
        assert params["mlp_in"]["kernel"].shape == (6, 4)  # D / 2, as in VSE-infinity
    pool = {"params": params["pooling"]} if "pooling" in params else {}
    pooled = Pool(pooling).apply(pool, raw(params, REGIONS), MASK)
    np.testing.assert_allclose(found.pooled, pooled / np.linalg.norm(pooled, axis=-1, keepdims=True), atol=1e-5)


def test_masked_regions_have_no_effect_and_gradients_are_finite():
    module = RegionEncoder(8, "mlp", "gpo")
    params = module.init(jax.random.key(0), REGIONS, mask=MASK)

    def run(params, regions):
        found = module.apply(params, regions, mask=MASK)
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


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_regions_become_features(projection):
    module = RegionEncoder(8, projection, "gpo")
    params = module.init(jax.random.key(0), REGIONS, mask=MASK)
    found = module.apply(params, REGIONS, mask=MASK)
    assert found.fragments.shape == (3, 4, 8)
    np.testing.assert_allclose(np.linalg.norm(found.fragments, axis=-1), MASK, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.pooled, axis=-1), MASK.any(1), atol=1e-5)
    alone = module.apply(params, REGIONS[1:2], mask=MASK[1:2])
    np.testing.assert_allclose(alone.pooled, found.pooled[1:2], atol=1e-5)
    p = jax.tree.map(np.asarray, params["params"])
    expected = REGIONS[0] @ p["regions"]["kernel"] + p["regions"]["bias"]
    if projection == "mlp":
        y = REGIONS[0] @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"]
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        y = np.maximum(y * p["mlp_norm"]["scale"] + p["mlp_norm"]["bias"], 0)
        expected = expected + y @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(found.fragments[0], expected, atol=1e-5)


def test_what_stands_at_padded_places_does_not_matter():
    module = RegionEncoder(8, "mlp", "max")
    params = module.init(jax.random.key(0), REGIONS, mask=MASK)
    found = module.apply(params, REGIONS, mask=MASK)
    other = module.apply(params, np.where(MASK[..., None], REGIONS, np.nan), mask=MASK)
    jax.tree.map(np.testing.assert_array_equal, other, found)


def test_regions_are_left_out_by_their_own_key():
    mask = np.ones((2000, 10), bool)
    mask[:, 8:] = False
    keys = jax.random.split(jax.random.key(0), len(mask))
    kept = np.asarray(region_dropout(jnp.asarray(mask), keys, 0.3))
    assert not kept[:, 8:].any()
    assert kept[:, :8].mean() == pytest.approx(0.7, abs=0.01)
    np.testing.assert_array_equal(kept[5:9], region_dropout(jnp.asarray(mask[5:9]), keys[5:9], 0.3))
    almost_none = np.asarray(region_dropout(jnp.asarray(mask), keys, 0.999))
    assert (almost_none.sum(1) >= 1).all()
    assert (almost_none & mask).sum() == almost_none.sum()
    assert almost_none.sum() < 1.1 * len(mask)


def test_a_left_out_region_has_no_effect_and_evaluation_leaves_none_out():
    module = RegionEncoder(8, "mlp", "gpo", dropout=0.5)
    params = module.init(jax.random.key(0), REGIONS)
    keys = jax.random.split(jax.random.key(1), 3)
    trained = module.apply(params, REGIONS, False, keys)
    assert not trained.mask.all()
    changed = np.where(trained.mask[..., None], REGIONS, 7.0)
    jax.tree.map(np.testing.assert_array_equal, trained, module.apply(params, changed, False, keys))
    assert module.apply(params, REGIONS).mask.all()
