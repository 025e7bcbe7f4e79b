"""MEFN's matcher: the readable form against NumPy loops, the Gram form against the readable one, the ablations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.features import make_features
from mefn_jax.matching.cosine import PooledCosine
from mefn_jax.matching.entropy import ENTROPIES
from mefn_jax.matching.mefn import DIRECTIONS, GLOBAL_INPUTS, MEFN, unified_embeddings
from mefn_jax.model import MODELS

N, M, D = 4, 5, 6


def features(seed, mask, identical=False):
    rng = np.random.default_rng(seed)
    mask = jnp.asarray(mask)
    raw = rng.normal(size=(*mask.shape, D)).astype(np.float32)
    if identical:
        raw[:] = raw[:, :1]
    return make_features(raw, mask, rng.normal(size=(len(mask), D)).astype(np.float32))


def unit(x):
    return x / np.linalg.norm(x)


def naive_score(image, text, scale, kappa, gate):
    """DESIGN.md 3.2 to 3.4 for one pair of existing fragments, Shannon entropy, both directions; float64 loops."""
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
def matcher(**options):
    """A matcher, its parameters, and its compiled scores; shared by all examples of one padded shape."""
    module = MEFN(**options)
    ones = features(0, np.ones((3, N), bool)), features(1, np.ones((3, M), bool))
    params = jax.jit(module.init)(jax.random.key(0), *ones)
    return params, jax.jit(module.apply), jax.jit(functools.partial(module.apply, method="explain"))


masks = st.lists(
    st.tuples(
        st.lists(st.booleans(), min_size=N, max_size=N).filter(any),
        st.lists(st.booleans(), min_size=M, max_size=M).filter(any),
    ),
    min_size=3,
    max_size=3,
)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), masks)
def test_both_forms_equal_naive_loops(seed, masks):
    regions, words = (np.array(m) for m in zip(*masks, strict=True))
    images, texts = features(seed, regions), features(seed + 1, words)
    params, apply, explain = matcher()
    scores = np.asarray(apply(params, images, texts))
    for i, t in itertools.product(range(3), repeat=2):
        existing = [
            (np.asarray(f.fragments[k])[np.asarray(f.mask[k])], f.pooled[k]) for f, k in ((images, i), (texts, t))
        ]
        expected = naive_score(*existing, 9.0, 4.0, 0.5)
        assert scores[i, t] == pytest.approx(expected, abs=1e-5)
        image, text = jax.tree.map(lambda x, i=i: x[i], images), jax.tree.map(lambda x, t=t: x[t], texts)
        assert float(explain(params, image, text)["score"]) == pytest.approx(expected, abs=1e-5)


OPTIONS = list(itertools.product(sorted(ENTROPIES), DIRECTIONS, GLOBAL_INPUTS))
OPTIONS_OF_MEFN = "shannon", "both", "weighted"


@functools.cache
def both_forms(*options):
    """`(params, images, texts) -> gradients, scores` of the Gram form and of the readable one, and parameters."""
    module = MEFN(*options)

    def readable(params, images, texts):
        def one(i, t):
            return module.apply(params, i, t, method="explain")["score"]

        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(images, texts)

    def compiled(form):
        def total(params, v, t, images, texts):
            # Through `make_features`: the Gram form uses that fragments have unit length.
            v, t = (make_features(x, f.mask, f.pooled) for x, f in ((v, images), (t, texts)))
            scores = form(params, v, t)
            return jnp.sum(scores * jnp.arange(9.0).reshape(3, 3)), scores

        return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))

    some = features(2, np.ones((3, N), bool)), features(3, np.ones((3, M), bool))
    return compiled(module.apply), compiled(readable), jax.jit(module.init)(jax.random.key(0), *some)


def check_forms(options, images, texts):
    """Scores to 1e-5; gradients to 1e-5 of the largest of all."""
    gram, readable, params = both_forms(*options)
    (found, scores), (expected, true_scores) = (
        form(params, images.fragments, texts.fragments, images, texts) for form in (gram, readable)
    )
    np.testing.assert_allclose(scores, true_scores, atol=1e-5)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(largest, 1.0))


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_gram_form_equals_readable_form_with_its_gradients(options):
    mask = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 0, 1, 1]], bool)
    for identical in (False, True):
        check_forms(options, features(2, mask[:, :N], identical), features(3, mask, identical))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), masks, st.booleans())
def test_gram_form_equals_readable_form_whatever_there_is(seed, masks, identical):
    """One-word texts, one-region images and equal fragments are among the examples."""
    regions, words = (np.array(m) for m in zip(*masks, strict=True))
    check_forms(OPTIONS_OF_MEFN, features(seed, regions, identical), features(seed + 1, words, identical))


@pytest.mark.parametrize("attend", DIRECTIONS)
def test_the_score_is_the_distance_of_the_unified_embeddings(attend):
    images, texts = features(4, np.ones((1, N), bool)), features(5, np.array([[1, 1, 1, 0, 0]], bool))
    image, text = (jax.tree.map(lambda x: x[0], f) for f in (images, texts))
    params, _, explain = matcher(local=attend)
    parts = explain(params, image, text)
    f_v, f_t = unified_embeddings(image, text, parts, parts["gate"], attend)
    assert float(f_v @ f_v) == pytest.approx(1, abs=1e-5)
    assert float(f_t @ f_t) == pytest.approx(1, abs=1e-5)
    assert float(jnp.sum((f_v - f_t) ** 2)) == pytest.approx(2 - 2 * float(parts["score"]), abs=1e-5)


def test_padding_changes_nothing():
    images, texts = features(6, np.ones((2, N), bool)), features(7, np.array([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], bool))
    short = jax.tree.map(lambda x: x[:, :2] if x.ndim > 1 and x.shape[1] == M else x, texts)
    params, apply, _ = matcher()
    a, b = apply(params, images, texts), apply(params, images, short)
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_ablations_are_what_they_say():
    images, texts = features(8, np.ones((2, N), bool)), features(9, np.ones((2, M), bool))

    def parts(name):
        kind, options = MODELS[name]
        module = kind(**options)
        params = module.init(jax.random.key(0), images, texts)
        first = [jax.tree.map(lambda x: x[0], f) for f in (images, texts)]
        return module.apply(params, *first, method="explain"), module.apply(params, images, texts)[0, 0], params

    found, score, params = parts("mefn_no_entropy")
    np.testing.assert_allclose(found["region_weights"], 1 / N, rtol=1e-6)
    np.testing.assert_allclose(found["word_weights"], 1 / M, rtol=1e-6)
    assert "log_sharpness" not in params["params"]
    found, score, params = parts("mefn_no_local")
    assert float(score) == pytest.approx(float(found["global"]), abs=1e-6)
    assert "gate_logit" not in params["params"]
    found, score, _ = parts("mefn_no_global")
    assert float(score) == pytest.approx(float(found["local"]), abs=1e-6)
    found, score, params = parts("mefn")
    assert float(score) == pytest.approx(float(found["local"] + found["global"]) / 2, abs=1e-6)
    assert float(jnp.sum(found["H"])) == pytest.approx(float(found["MFE"]), abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), masks)
def test_vsepp_is_the_cosine_of_pooled_whatever_the_masks(seed, masks):
    regions, words = (np.array(m) for m in zip(*masks, strict=True))
    images, texts = features(seed, regions), features(seed + 1, words)
    scores = PooledCosine().apply({}, images, texts)
    for i, t in itertools.product(range(3), repeat=2):
        expected = unit(np.asarray(images.pooled[i], np.float64)) @ unit(np.asarray(texts.pooled[t], np.float64))
        assert float(scores[i, t]) == pytest.approx(expected, abs=1e-5)


def test_masked_fragments_are_exactly_zero_and_the_rest_unit():
    found = features(1, np.array([[1, 0, 1, 0, 0]], bool))
    lengths = np.linalg.norm(found.fragments[0], axis=-1)
    assert lengths[1] == lengths[3] == lengths[4] == 0
    np.testing.assert_allclose(lengths[[0, 2]], 1, rtol=1e-6)
