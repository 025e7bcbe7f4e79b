"""MEFN: scores against NumPy loops, padding, unified embeddings and the ablations."""

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

from mefn_jax.matching.mefn import DIRECTIONS, MEFN, unified_embeddings

N, M, D = 4, 5, 6


def unit(x):
    return x / np.linalg.norm(x)


def naive_score(image, text, scale, kappa, gate):
    """The score of one pair without masked fragments, with Shannon entropy and both directions, by float64 loops
    (docs/method.md)."""
    v, t, v_g, t_g = (np.asarray(x, np.float64) for x in (image[0], text[0], image[1], text[1]))
    S = v @ t.T

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    def entropy(p):
        return -sum(p * np.log(p)) / np.log(len(p)) if len(p) > 1 else 0.0

    H_v = np.array([entropy(softmax(scale * row)) for row in S])
    H_t = np.array([entropy(softmax(scale * column)) for column in S.T])
    w, u = softmax(-kappa * H_v), softmax(-kappa * H_t)
    a = [sum(p * x for p, x in zip(softmax(scale * S[:, j] - kappa * H_v), v, strict=True)) for j in range(len(t))]
    b = [sum(p * x for p, x in zip(softmax(scale * S[i] - kappa * H_t), t, strict=True)) for i in range(len(v))]
    local = 0.5 * sum(u[j] * unit(a[j]) @ unit(t[j]) for j in range(len(t)))
    local += 0.5 * sum(w[i] * unit(b[i]) @ unit(v[i]) for i in range(len(v)))
    whole = unit(v_g + w @ v) @ unit(t_g + u @ t)
    return (1 - gate) * whole + gate * local


@functools.cache
def compiled_mefn(**options):
    """MEFN's parameters, its compiled scores of all pairs and of one pair, shared by all examples of one shape."""
    module = MEFN(**options)
    params = jax.jit(module.init)(jax.random.key(0), random_features(0, 3, N, D), random_features(1, 3, M, D))
    return params, jax.jit(module.apply), jax.jit(functools.partial(module.apply, method="explain"))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), masks(3, N), masks(3, M))
def test_mefn_scores_and_explain_equal_naive_loops(seed, region_mask, word_mask):
    images, texts = random_features(seed, 3, N, D, region_mask), random_features(seed + 1, 3, M, D, word_mask)
    params, apply, explain = compiled_mefn()
    scores = np.asarray(apply(params, images, texts))
    for i, t in itertools.product(range(3), repeat=2):
        existing = [(f.fragments[k][f.mask[k]], f.pooled[k]) for f, k in ((images, i), (texts, t))]
        expected = naive_score(*existing, 9.0, 4.0, 0.5)
        assert scores[i, t] == pytest.approx(expected, abs=1e-5)
        image, text = jax.tree.map(lambda x, i=i: x[i], images), jax.tree.map(lambda x, t=t: x[t], texts)
        assert float(explain(params, image, text)["score"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("local", DIRECTIONS)
def test_mefn_score_is_distance_of_unified_embeddings(local):
    word_mask = np.array([[1, 1, 1, 0, 0]], bool)
    images, texts = random_features(4, 1, N, D), random_features(5, 1, M, D, word_mask)
    image, text = (jax.tree.map(lambda x: x[0], f) for f in (images, texts))
    params, _, explain = compiled_mefn(local=local)
    terms = explain(params, image, text)
    f_v, f_t = unified_embeddings(image, text, terms, terms["gate"], local)
    assert float(f_v @ f_v) == pytest.approx(1, abs=1e-5)
    assert float(f_t @ f_t) == pytest.approx(1, abs=1e-5)
    assert float(jnp.sum((f_v - f_t) ** 2)) == pytest.approx(2 - 2 * float(terms["score"]), abs=1e-5)


def test_mefn_score_ignores_padding():
    word_mask = np.array([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
    images, texts = random_features(6, 2, N, D), random_features(7, 2, M, D, word_mask)
    short = jax.tree.map(lambda x: x[:, :2] if x.ndim > 1 and x.shape[1] == M else x, texts)
    params, apply, _ = compiled_mefn()
    np.testing.assert_allclose(apply(params, images, texts), apply(params, images, short), atol=1e-6)


def test_mefn_ablations_remove_their_terms():
    images, texts = random_features(8, 2, N, D), random_features(9, 2, M, D)

    def terms_of(name):
        module = make_matcher(name)
        params = module.init(jax.random.key(0), images, texts)
        first = [jax.tree.map(lambda x: x[0], f) for f in (images, texts)]
        return module.apply(params, *first, method="explain"), module.apply(params, images, texts)[0, 0], params

    terms, score, params = terms_of("mefn_no_entropy")
    np.testing.assert_allclose(terms["region_weights"], 1 / N, rtol=1e-6)
    np.testing.assert_allclose(terms["word_weights"], 1 / M, rtol=1e-6)
    assert "log_kappa" not in params["params"]
    terms, score, params = terms_of("mefn_no_local")
    assert float(score) == pytest.approx(float(terms["global"]), abs=1e-6)
    assert "gate_logit" not in params["params"]
    terms, score, _ = terms_of("mefn_no_global")
    assert float(score) == pytest.approx(float(terms["local"]), abs=1e-6)
    terms, score, params = terms_of("mefn")
    assert float(score) == pytest.approx(float(terms["local"] + terms["global"]) / 2, abs=1e-6)
    assert float(jnp.sum(terms["H"])) == pytest.approx(float(terms["MFE"]), abs=1e-6)
