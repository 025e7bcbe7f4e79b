"""The encoder of precomputed regions: projection, pooling, masks and region dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mefn_jax.encoders.pooling import Pool
from mefn_jax.encoders.regions import PROJECTIONS, RegionEncoder, region_dropout

RNG = np.random.default_rng(0)
REGIONS = RNG.normal(size=(3, 4, 6)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]], bool)


def project(p, regions):
    """The projected regions before normalization."""
    x = linear(p["regions"], regions)
    if "mlp_in" in p:
        y = linear(p["mlp_in"], regions)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        x = x + linear(p["mlp_out"], np.maximum(y * p["mlp_norm"]["scale"] + p["mlp_norm"]["bias"], 0))
    return x


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


@pytest.mark.parametrize(
    ("projection", "pooling"), [*((p, "mean") for p in PROJECTIONS), *(("mlp", p) for p in ("max", "gpo", "esa"))]
)
def test_region_encoder_pools_unnormalized_projections(projection, pooling):
    module = RegionEncoder(8, projection, pooling)
    variables = jax.tree.map(np.asarray, module.init(jax.random.key(0), REGIONS, mask=MASK))
    features, params = module.apply(variables, REGIONS, mask=MASK), variables["params"]
    if projection == "mlp":
        assert params["mlp_in"]["kernel"].shape == (6, 4)  # D / 2, as in VSE-infinity
    pool = {"params": params["pooling"]} if "pooling" in params else {}
    pooled = Pool(pooling).apply(pool, project(params, REGIONS), MASK)
    np.testing.assert_allclose(features.pooled, pooled / np.linalg.norm(pooled, axis=-1, keepdims=True), atol=1e-5)


def test_region_encoder_ignores_masked_regions_with_finite_gradients():
    module = RegionEncoder(8, "mlp", "gpo")
    params = module.init(jax.random.key(0), REGIONS, mask=MASK)

    def run(params, regions):
        features = module.apply(params, regions, mask=MASK)
        return jnp.sum(features.fragments[..., 0]) + jnp.sum(features.pooled[:, 0]), features

    step = jax.jit(jax.value_and_grad(run, has_aux=True))
    (_, features), gradients = step(params, REGIONS)
    changed = step(params, np.where(MASK[..., None], REGIONS, 7.0).astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, changed[0][1], features)
    assert np.all(np.asarray(features.fragments)[~MASK] == 0)
    for a, b in zip(jax.tree.leaves(changed[1]), jax.tree.leaves(gradients), strict=True):
        assert np.all(np.isfinite(b))
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert all(np.any(gradients["params"][name]["kernel"]) for name in ("regions", "mlp_in", "mlp_out"))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_region_encoder_projects_and_normalizes_regions(projection):
    module = RegionEncoder(8, projection, "gpo")
    params = module.init(jax.random.key(0), REGIONS, mask=MASK)
    features = module.apply(params, REGIONS, mask=MASK)
    assert features.fragments.shape == (3, 4, 8)
    np.testing.assert_allclose(np.linalg.norm(features.fragments, axis=-1), MASK, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(features.pooled, axis=-1), MASK.any(1), atol=1e-5)
    alone = module.apply(params, REGIONS[1:2], mask=MASK[1:2])
    np.testing.assert_allclose(alone.pooled, features.pooled[1:2], atol=1e-5)
    p = jax.tree.map(np.asarray, params["params"])
    expected = REGIONS[0] @ p["regions"]["kernel"] + p["regions"]["bias"]
    if projection == "mlp":
        y = REGIONS[0] @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"]
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        y = np.maximum(y * p["mlp_norm"]["scale"] + p["mlp_norm"]["bias"], 0)
        expected = expected + y @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(features.fragments[0], expected, atol=1e-5)


def test_region_encoder_ignores_nan_in_padding():
    module = RegionEncoder(8, "mlp", "max")
    params = module.init(jax.random.key(0), REGIONS, mask=MASK)
    features = module.apply(params, REGIONS, mask=MASK)
    changed = module.apply(params, np.where(MASK[..., None], REGIONS, np.nan), mask=MASK)
    jax.tree.map(np.testing.assert_array_equal, changed, features)


def test_region_dropout_draws_by_key_of_each_image():
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


def test_region_encoder_drops_regions_in_training_only():
    module = RegionEncoder(8, "mlp", "gpo", dropout=0.5)
    params = module.init(jax.random.key(0), REGIONS)
    keys = jax.random.split(jax.random.key(1), 3)
    trained = module.apply(params, REGIONS, False, keys)
    assert not trained.mask.all()
    changed = np.where(trained.mask[..., None], REGIONS, 7.0)
    jax.tree.map(np.testing.assert_array_equal, trained, module.apply(params, changed, False, keys))
    assert module.apply(params, REGIONS).mask.all()
