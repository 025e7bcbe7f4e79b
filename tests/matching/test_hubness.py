"""Hubness offsets: the log-mean-exp against a loop, their effect on scores, and finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_features import random_features
from systems import make_matcher

from mefn_jax.features import make_features
from mefn_jax.matching.hubness import HubnessCorrection, log_mean_exp_similarity
from mefn_jax.model import Model

N, M, D = 4, 5, 6


def make_model(name, images, texts, **options):
    """A model without encoders, whose hubness correction has random hub vectors and a weight of 0.7; its parameters."""
    matcher, hubness = make_matcher(name, **options), HubnessCorrection(4, 20.0)
    params = {"matcher": matcher.init(jax.random.key(0), images, texts).get("params", {})}
    params["hubness"] = hubness.init(jax.random.key(1), images.pooled, texts.pooled)["params"]
    params["hubness"]["weight"] = jnp.float32(0.7)
    return Model(image=None, text=None, matcher=matcher, hubness=hubness, loss={}), params


def naive_offset(x, hubs, scale):
    cosines = [x @ b / np.linalg.norm(b) for b in hubs]
    return np.log(np.mean(np.exp(scale * np.array(cosines)))) / scale


def test_log_mean_exp_similarity_equals_loop():
    rng = np.random.default_rng(0)
    hubs = rng.normal(size=(5, D))
    pooled = random_features(1, 3, N, D).pooled
    for k, x in enumerate(pooled):
        found = float(log_mean_exp_similarity(pooled, jnp.float32(hubs), 7.0)[k])
        assert found == pytest.approx(naive_offset(x, hubs, 7.0), abs=1e-5)
    nearest = np.max(pooled @ (hubs / np.linalg.norm(hubs, axis=1, keepdims=True)).T, 1)
    np.testing.assert_allclose(log_mean_exp_similarity(pooled, jnp.float32(hubs), 1e4), nearest, atol=1e-3)


def test_hubness_correction_compares_images_with_text_hubs():
    images, texts = (random_features(seed, 3, N, D).pooled for seed in (1, 2))
    module = HubnessCorrection(4, 20.0)
    params = module.init(jax.random.key(0), images, texts)["params"]
    assert params["weight"] == 1
    found = module.apply({"params": params | {"weight": jnp.float32(0.5)}}, images, texts)
    for offsets, vectors, hubs in zip(found, (images, texts), (params["texts"], params["images"]), strict=True):
        np.testing.assert_allclose(offsets, [0.5 * naive_offset(x, hubs, 20.0) for x in vectors], atol=1e-5)


@pytest.mark.parametrize("branches", ["both", "local"])
def test_explain_subtracts_hub_offsets_from_score(branches):
    images, texts = random_features(2, 3, N, D), random_features(3, 2, M, D)
    model, params = make_model("mefn", images, texts, branches=branches)
    scores = model.score(params, images, texts)
    image_offsets, text_offsets = model.hub_offsets(params, images, texts)
    for i, t in ((0, 0), (2, 1)):
        pair = jax.tree.map(lambda x, i=i: x[i], images), jax.tree.map(lambda x, t=t: x[t], texts)
        terms = model.explain(params, *pair)
        expected = float(scores[i, t] - image_offsets[i] - text_offsets[t])
        assert float(terms["score"]) == pytest.approx(expected, abs=1e-5)
        assert float(terms["image_hub_offset"]) == pytest.approx(float(image_offsets[i]), abs=1e-6)
        assert float(terms["text_hub_offset"]) == pytest.approx(float(text_offsets[t]), abs=1e-6)


def test_index_vectors_rank_as_corrected_scores():
    """The products of a dual encoder's index vectors are its corrected scores, up to the offset of each text."""
    images, texts = random_features(2, 40, N, D), random_features(3, 30, M, D)
    model, params = make_model("vsepp", images, texts)
    image_offsets, text_offsets = model.hub_offsets(params, images, texts)
    scores = model.score(params, images, texts)
    corrected = np.asarray(scores - image_offsets[:, None] - text_offsets)
    image_vectors, text_vectors = model.image_vectors(params, images), model.text_vectors(params, texts)
    assert image_vectors.shape == (40, D + 1)
    products = np.asarray(image_vectors @ text_vectors.T)
    np.testing.assert_allclose(products - np.asarray(text_offsets), corrected, atol=1e-6)
    order = np.argsort(-corrected, 0)
    np.testing.assert_array_equal(np.argsort(-products, 0), order)
    assert np.any(np.argsort(-np.asarray(scores), 0) != order)  # the offsets matter


def test_offsets_are_computed_at_full_precision():
    """A certificate takes the offsets of two programs for equal; accelerators round products to 8 or 11 bits."""
    program = jax.make_jaxpr(lambda x, hubs: log_mean_exp_similarity(x, hubs, 20.0))(np.ones((3, D)), np.ones((4, D)))
    precisions = [e.params["precision"] for e in program.eqns if e.primitive.name == "dot_general"]
    assert precisions == [(jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)]


def test_hub_offset_demotes_hub():
    """A text close to every image ranks first for each by cosine, but not after its offset over these images is
    subtracted."""
    own = np.eye(3, D, dtype=np.float32) + np.float32(1.0)
    images = random_features(4, 3, N, D).replace(pooled=own / np.linalg.norm(own, axis=1, keepdims=True))
    hub = images.pooled.mean(0)
    texts = 0.6 * np.eye(3, D, dtype=np.float32) + np.float32(0.3) * np.random.default_rng(0).normal(size=(3, D))
    texts = np.concatenate([texts, hub[None]]).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    cosines = images.pooled @ texts.T
    assert np.all(np.argmax(cosines, 1) == 3)
    scores = cosines - log_mean_exp_similarity(texts, images.pooled, 20.0)[None]
    assert np.all(np.argmax(np.asarray(scores), 1) == [0, 1, 2])


@pytest.mark.parametrize(
    ("name", "options"),
    [*(("mefn", {"branches": branches}) for branches in ("both", "local", "global")), ("scan_t2i_avg", {})],
)
def test_hubness_gradients_are_finite_for_identical_vectors(name, options):
    mask = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 0, 1, 1]], bool)
    images = random_features(5, 3, N, D, mask[:, :N], repeat="fragments")
    texts = random_features(6, 3, M, D, mask, repeat="fragments")
    model, params = make_model(name, images, texts, **options)
    params["hubness"] |= {"images": jnp.tile(images.pooled[:1], (4, 1)), "texts": jnp.zeros((4, D))}

    def total(params, v, t):
        v, t = make_features(v, images.mask, images.pooled), make_features(t, texts.mask, texts.pooled)
        image_offsets, text_offsets = model.hub_offsets(params, v, t)
        scores = model.score(params, v, t) - image_offsets[:, None] - text_offsets
        return jnp.sum(scores * jnp.arange(9.0).reshape(3, 3))

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(params, images.fragments, texts.fragments)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
    assert np.any(gradients[0]["hubness"]["images"])
    assert gradients[0]["hubness"]["weight"] != 0
