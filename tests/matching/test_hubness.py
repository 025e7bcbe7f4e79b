"""Hubness offsets: the log-mean-exp against a loop, their effect on scores, and finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_features import random_features

from mefn_jax.features import make_features
from mefn_jax.matching.hubness import HubnessBank, log_mean_exp_similarity
from mefn_jax.matching.mefn import MEFN

N, M, D = 4, 5, 6


def test_log_mean_exp_similarity_equals_loop():
    rng = np.random.default_rng(0)
    hubs = rng.normal(size=(5, D))
    pooled = random_features(1, 3, N, D).pooled
    for k, x in enumerate(pooled):
        cosines = [x @ b / np.linalg.norm(b) for b in hubs]
        expected = np.log(np.mean(np.exp(7.0 * np.array(cosines)))) / 7.0
        assert float(log_mean_exp_similarity(pooled, jnp.float32(hubs), 7.0)[k]) == pytest.approx(expected, abs=1e-5)
    nearest = np.max(pooled @ (hubs / np.linalg.norm(hubs, axis=1, keepdims=True)).T, 1)
    np.testing.assert_allclose(log_mean_exp_similarity(pooled, jnp.float32(hubs), 1e4), nearest, atol=1e-3)


def test_hub_offsets_are_subtracted_from_scores():
    images, texts = random_features(2, 3, N, D), random_features(3, 2, M, D)
    module, without = MEFN(hub_vectors=4), MEFN()
    params = module.init(jax.random.key(0), images, texts)
    plain = {k: v for k, v in params["params"].items() if "background" not in k}
    scores, plain_scores = module.apply(params, images, texts), without.apply({"params": plain}, images, texts)
    hubs = {"params": params["params"]["backgrounds"]}
    image_offsets, text_offsets = HubnessBank(4).apply(hubs, images.pooled, texts.pooled, 20.0)
    np.testing.assert_allclose(scores, plain_scores - image_offsets[:, None] - text_offsets[None], atol=1e-5)
    for i, t in ((0, 0), (2, 1)):
        pair = jax.tree.map(lambda x, i=i: x[i], images), jax.tree.map(lambda x, t=t: x[t], texts)
        terms = module.apply(params, *pair, method="explain")
        assert float(terms["score"]) == pytest.approx(float(scores[i, t]), abs=1e-5)
        assert float(terms["image_hub_offset"]) == pytest.approx(float(image_offsets[i]), abs=1e-6)


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


@pytest.mark.parametrize("branches", ["both", "local", "global"])
def test_hubness_gradients_are_finite_for_identical_vectors(branches):
    module = MEFN(hub_vectors=3, branches=branches)
    mask = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 0, 1, 1]], bool)
    images = random_features(5, 3, N, D, mask[:, :N], repeat="fragments")
    texts = random_features(6, 3, M, D, mask, repeat="fragments")
    params = module.init(jax.random.key(0), images, texts)
    hubs = {"images": jnp.tile(images.pooled[:1], (3, 1)), "texts": jnp.zeros((3, D))}
    params = {"params": params["params"] | {"backgrounds": hubs}}

    def total(params, v, t):
        v, t = make_features(v, images.mask, images.pooled), make_features(t, texts.mask, texts.pooled)
        return jnp.sum(module.apply(params, v, t) * jnp.arange(9.0).reshape(3, 3))

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(params, images.fragments, texts.fragments)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
