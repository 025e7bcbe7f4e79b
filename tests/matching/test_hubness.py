"""MEFN's background: levels against a loop, what they do to a score, and where they begin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mefn import D, M, N, features

from mefn_jax.features import make_features
from mefn_jax.matching.hubness import HubnessBank, log_mean_exp_similarity
from mefn_jax.matching.mefn import MEFN


def test_a_level_is_the_free_energy_over_the_background():
    rng = np.random.default_rng(0)
    background = rng.normal(size=(5, D))
    pooled = np.asarray(features(1, np.ones((3, N), bool)).pooled)
    for k, x in enumerate(pooled):
        cosines = [x @ b / np.linalg.norm(b) for b in background]
        expected = np.log(np.mean(np.exp(7.0 * np.array(cosines)))) / 7.0
        assert float(log_mean_exp_similarity(pooled, jnp.float32(background), 7.0)[k]) == pytest.approx(
            expected, abs=1e-5
        )
    nearest = np.max(pooled @ (background / np.linalg.norm(background, axis=1, keepdims=True)).T, 1)
    np.testing.assert_allclose(log_mean_exp_similarity(pooled, jnp.float32(background), 1e4), nearest, atol=1e-3)


def test_scores_are_less_the_levels_of_either_side_alone():
    images, texts = features(2, np.ones((3, N), bool)), features(3, np.ones((2, M), bool))
    with_it, without = MEFN(hub_vectors=4), MEFN()
    params = with_it.init(jax.random.key(0), images, texts)
    plain = {k: v for k, v in params["params"].items() if "background" not in k}
    scores, cosines = with_it.apply(params, images, texts), without.apply({"params": plain}, images, texts)
    backgrounds = {"params": params["params"]["backgrounds"]}
    of_images, of_texts = HubnessBank(4).apply(backgrounds, images.pooled, texts.pooled, 20.0)
    np.testing.assert_allclose(scores, cosines - of_images[:, None] - of_texts[None], atol=1e-5)
    for i, t in ((0, 0), (2, 1)):
        one = jax.tree.map(lambda x, i=i: x[i], images), jax.tree.map(lambda x, t=t: x[t], texts)
        parts = with_it.apply(params, *one, method="explain")
        assert float(parts["score"]) == pytest.approx(float(scores[i, t]), abs=1e-5)
        assert float(parts["image_hub_offset"]) == pytest.approx(float(of_images[i]), abs=1e-6)


def test_a_hub_loses_its_places():
    """A text near every image is first everywhere by cosine; over a background of these images it is not."""
    own = np.eye(3, D, dtype=np.float32) + np.float32(1.0)
    images = features(4, np.ones((3, N), bool)).replace(pooled=own / np.linalg.norm(own, axis=1, keepdims=True))
    hub = images.pooled.mean(0)
    texts = 0.6 * np.eye(3, D, dtype=np.float32) + np.float32(0.3) * np.random.default_rng(0).normal(size=(3, D))
    texts = np.concatenate([texts, hub[None]]).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    cosines = images.pooled @ texts.T
    assert np.all(np.argmax(cosines, 1) == 3)
    scores = cosines - log_mean_exp_similarity(texts, images.pooled, 20.0)[None]
    assert np.all(np.argmax(np.asarray(scores), 1) == [0, 1, 2])


@pytest.mark.parametrize("branches", ["both", "local", "global"])
def test_gradients_are_finite_with_identical_fragments_and_backgrounds(branches):
    module = MEFN(hub_vectors=3, branches=branches)
    mask = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 0, 1, 1]], bool)
    images, texts = features(5, mask[:, :N], identical=True), features(6, mask, identical=True)
    params = module.init(jax.random.key(0), images, texts)
    same = {"images": jnp.tile(images.pooled[:1], (3, 1)), "texts": jnp.zeros((3, D))}
    params = {"params": params["params"] | {"backgrounds": same}}

    def total(params, v, t):
        v, t = make_features(v, images.mask, images.pooled), make_features(t, texts.mask, texts.pooled)
        return jnp.sum(module.apply(params, v, t) * jnp.arange(9.0).reshape(3, 3))

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(params, images.fragments, texts.fragments)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
