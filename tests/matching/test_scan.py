"""SCAN's four forms against the formulae of PEERS.md 3, written out for one pair with attended vectors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mefn import D, M, N, features, masks

from mefn_jax.features import make_features
from mefn_jax.model import MODELS

FORMS = sorted(name for name in MODELS if name.startswith("scan"))
# lambda and l on Flickr30K (PEERS.md 3).
PUBLISHED = {"t2i_lse": (9, 6), "t2i_avg": (9, None), "i2t_lse": (4, 5), "i2t_avg": (4, None)}


def naive_score(v, t, form):
    """The score of existing regions `v (N, D)` and words `t (M, D)`, unit vectors; float64 loops."""
    scale, sharpness = PUBLISHED[form.removeprefix("scan_")]
    sources, queries = (v, t) if "t2i" in form else (t, v)
    A = np.array([[s @ q for q in queries] for s in sources])
    A = np.where(A > 0, A, 0.1 * A)
    # t2i: each region's row over the words has unit length; i2t: each word's over the regions.
    A = np.array([row / max(np.linalg.norm(row), 1e-12) for row in A])
    cosines = []
    for q, query in enumerate(queries):
        weights = np.exp(scale * A[:, q]) / np.sum(np.exp(scale * A[:, q]))
        attended = sum(w * s for w, s in zip(weights, sources, strict=True))
        cosines.append(query @ attended / (np.linalg.norm(query) * np.linalg.norm(attended)))
    return np.mean(cosines) if sharpness is None else np.log(np.sum(np.exp(sharpness * np.array(cosines)))) / sharpness


def readable(form, image, text):
    """The same with masks and in JAX, so that it has gradients."""
    scale, sharpness = PUBLISHED[form.removeprefix("scan_")]
    (sources, queries), (here, asked) = (image.fragments, text.fragments), (image.mask, text.mask)
    if "i2t" in form:
        (sources, queries), (here, asked) = (queries, sources), (asked, here)
    A = sources @ queries.T
    A = jnp.where(A > 0, A, 0.1 * A)
    # Of a single query the norm leaves the sign, whose gradient is nothing, and would come out as rounding.
    A = jnp.where(jnp.sum(asked) > 1, A / jnp.sqrt(jnp.maximum(jnp.sum(A * A, 1, keepdims=True), 1e-24)), jnp.sign(A))
    attended = jax.nn.softmax(jnp.where(here[:, None], scale * A, -jnp.inf), 0).T @ sources
    r = jnp.sum(attended * queries, 1) / jnp.sqrt(jnp.maximum(jnp.sum(attended * attended, 1), 1e-24))
    if sharpness is None:
        return jnp.sum(jnp.where(asked, r, 0.0)) / jnp.sum(asked)
    return jax.nn.logsumexp(jnp.where(asked, sharpness * r, -jnp.inf)) / sharpness


@functools.cache
def compiled(form, as_written=False):
    matcher, options = MODELS[form]
    module = matcher(**options)

    def total(v, t, images, texts):
        v, t = make_features(v, images.mask, images.pooled), make_features(t, texts.mask, texts.pooled)
        if as_written:
            pair = functools.partial(readable, form)
            scores = jax.vmap(jax.vmap(pair, (None, 0)), (0, None))(v, t)
        else:
            scores = module.apply({}, v, t)
        return jnp.sum(scores * jnp.arange(9.0).reshape(3, 3)), scores

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), masks, st.booleans())
def test_equals_the_naive_form_with_its_gradients(form, seed, masks, identical):
    """One-word captions and one-region images are among the masks."""
    regions, words = (np.array(m) for m in zip(*masks, strict=True))
    images, texts = features(seed, regions, identical), features(seed + 1, words, identical)
    (_, scores), gradients = compiled(form)(images.fragments, texts.fragments, images, texts)
    for i, t in itertools.product(range(3), repeat=2):
        existing = [np.asarray(f.fragments[k], np.float64)[np.asarray(f.mask[k])] for f, k in ((images, i), (texts, t))]
        assert float(scores[i, t]) == pytest.approx(naive_score(*existing, form), abs=1e-5)
    (_, scores), expected = compiled(form, True)(images.fragments, texts.fragments, images, texts)
    largest = max(1.0, *(float(jnp.max(jnp.abs(x))) for x in expected))
    for a, b in zip(gradients, expected, strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_where_everything_is_identical_or_orthogonal(form):
    one = np.ones((3, 1, D), np.float32)
    images = make_features(np.repeat(one, N, 1), np.ones((3, N), bool), np.ones((3, D), np.float32))
    same = make_features(np.repeat(one, M, 1), np.ones((3, M), bool), np.ones((3, D), np.float32))
    flat = np.zeros((3, M, D), np.float32)
    flat[..., 0], flat[..., 1] = 1, -1  # orthogonal to all regions: every cosine is 0
    orthogonal = make_features(flat, np.ones((3, M), bool), np.ones((3, D), np.float32))
    for texts in (same, orthogonal):
        (_, scores), gradients = compiled(form)(images.fragments, texts.fragments, images, texts)
        assert np.all(np.isfinite(scores))
        assert all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_shortlists_are_by_the_mean_fragment(form):
    matcher, options = MODELS[form]
    found = features(3, np.array([[1, 1, 0, 0]], bool))
    mean = np.asarray(found.fragments[0, :2]).sum(0)
    np.testing.assert_allclose(matcher(**options).embed(found)[0], mean / np.linalg.norm(mean), atol=1e-6)
