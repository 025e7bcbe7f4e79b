"""SCAN's four forms against the published formulas, written out for one pair with attended vectors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_features import masks, random_features
from systems import make_matcher

from mefn_jax.features import make_features
from mefn_jax.matching.systems import MODELS

N, M, D = 4, 5, 6
FORMS = sorted(name for name in MODELS if name.startswith("scan"))


# The inverse temperature and the factor of the log-sum-exp (None: a mean) on Flickr30K.
PUBLISHED = {"t2i_lse": (9, 6), "t2i_avg": (9, None), "i2t_lse": (4, 5), "i2t_avg": (4, None)}


def naive_score(v, t, form):
    """The score of regions `v (N, D)` and words `t (M, D)`, unit vectors without padding, by float64 loops."""
    lam, lse_factor = PUBLISHED[form.removeprefix("scan_")]
    sources, queries = (v, t) if "t2i" in form else (t, v)
    A = np.array([[s @ q for q in queries] for s in sources])
    A = np.where(A > 0, A, 0.1 * A)
    # t2i: each region's cosines over the words get unit length; i2t: each word's over the regions.
    A = np.array([row / max(np.linalg.norm(row), 1e-12) for row in A])
    cosines = []
    for q, query in enumerate(queries):
        weights = np.exp(lam * A[:, q]) / np.sum(np.exp(lam * A[:, q]))
        attended = sum(w * s for w, s in zip(weights, sources, strict=True))
        cosines.append(query @ attended / (np.linalg.norm(query) * np.linalg.norm(attended)))
    return (
        np.mean(cosines) if lse_factor is None else np.log(np.sum(np.exp(lse_factor * np.array(cosines)))) / lse_factor
    )


def naive_score_jax(form, image, text):
    """The same score in JAX and with masks, for gradients."""
    lam, lse_factor = PUBLISHED[form.removeprefix("scan_")]
    (sources, queries), (source_mask, query_mask) = (image.fragments, text.fragments), (image.mask, text.mask)
    if "i2t" in form:
        (sources, queries), (source_mask, query_mask) = (queries, sources), (query_mask, source_mask)
    A = sources @ queries.T
    A = jnp.where(A > 0, A, 0.1 * A)
    # With a single query, normalization leaves only the sign. Its gradient is zero, but would be computed as rounding
    # errors.
    A = jnp.where(
        jnp.sum(query_mask) > 1, A / jnp.sqrt(jnp.maximum(jnp.sum(A * A, 1, keepdims=True), 1e-24)), jnp.sign(A)
    )
    attended = jax.nn.softmax(jnp.where(source_mask[:, None], lam * A, -jnp.inf), 0).T @ sources
    r = jnp.sum(attended * queries, 1) / jnp.sqrt(jnp.maximum(jnp.sum(attended * attended, 1), 1e-24))
    if lse_factor is None:
        return jnp.sum(jnp.where(query_mask, r, 0.0)) / jnp.sum(query_mask)
    return jax.nn.logsumexp(jnp.where(query_mask, lse_factor * r, -jnp.inf)) / lse_factor


@functools.cache
def compiled_form(form, naive=False):
    module = make_matcher(form)

    def total(v, t, images, texts):
        v, t = make_features(v, images.mask, images.pooled), make_features(t, texts.mask, texts.pooled)
        if naive:
            pair = functools.partial(naive_score_jax, form)
            scores = jax.vmap(jax.vmap(pair, (None, 0)), (0, None))(v, t)
        else:
            scores = module.apply({}, v, t)
        return jnp.sum(scores * jnp.arange(9.0).reshape(3, 3)), scores

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), masks(3, N), masks(3, M), st.sampled_from(["", "fragments"]))
def test_scan_equals_naive_form_with_gradients(form, seed, region_mask, word_mask, repeat):
    """The masks include one-word captions and one-region images."""
    images = random_features(seed, 3, N, D, region_mask, repeat=repeat)
    texts = random_features(seed + 1, 3, M, D, word_mask, repeat=repeat)
    (_, scores), gradients = compiled_form(form)(images.fragments, texts.fragments, images, texts)
    for i, t in itertools.product(range(3), repeat=2):
        existing = [np.asarray(f.fragments[k], np.float64)[np.asarray(f.mask[k])] for f, k in ((images, i), (texts, t))]
        assert float(scores[i, t]) == pytest.approx(naive_score(*existing, form), abs=1e-5)
    (_, scores), expected = compiled_form(form, True)(images.fragments, texts.fragments, images, texts)
    largest = max(1.0, *(float(jnp.max(jnp.abs(x))) for x in expected))
    for a, b in zip(gradients, expected, strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("form", FORMS)
def test_scan_gradients_are_finite_for_identical_and_orthogonal_fragments(form):
    one = np.ones((3, 1, D), np.float32)
    images = make_features(np.repeat(one, N, 1), np.ones((3, N), bool), np.ones((3, D), np.float32))
    same = make_features(np.repeat(one, M, 1), np.ones((3, M), bool), np.ones((3, D), np.float32))
    signs = np.zeros((3, M, D), np.float32)
    signs[..., 0], signs[..., 1] = 1, -1  # orthogonal to all regions, so that every cosine is 0
    orthogonal = make_features(signs, np.ones((3, M), bool), np.ones((3, D), np.float32))
    for texts in (same, orthogonal):
        (_, scores), gradients = compiled_form(form)(images.fragments, texts.fragments, images, texts)
        assert np.all(np.isfinite(scores))
        assert all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_scan_embeds_mean_fragment(form):
    features = random_features(3, 1, N, D, np.array([[1, 1, 0, 0]], bool))
    mean = features.fragments[0, :2].sum(0)
    np.testing.assert_allclose(make_matcher(form).embed(features)[0], mean / np.linalg.norm(mean), atol=1e-6)
