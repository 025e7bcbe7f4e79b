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

from mefn_jax.matching.mefn import MEFN, unified_embeddings

N, M, D = 4, 5, 6


def unit(x):
    return x / np.linalg.norm(x)


def unit_rows(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def shannon(p):
    """The Shannon entropy divided by its largest value; 1 where there is no choice."""
    return -sum(p * np.log(p)) / np.log(len(p)) if len(p) > 1 else 1.0


def naive_entropies(S, scale):
    """The entropies of regions and of words, by loops."""
    return tuple(np.array([shannon(softmax(scale * row)) for row in x]) for x in (S, S.T))


def naive_score(image, text, scale, kappa, gate, evidence_weight, evidence_scale, global_input):
    """The score of one pair without masked fragments, with Shannon entropy and both directions, by float64 loops
    (docs/method.md)."""
    v, t, v_g, t_g = (np.asarray(x, np.float64) for x in (image[0], text[0], image[1], text[1]))
    S = v @ t.T
    H_v, H_t = naive_entropies(S, scale)
    w, u = softmax(-kappa * H_v), softmax(-kappa * H_t)
    a = [sum(p * x for p, x in zip(softmax(scale * S[:, j] - kappa * H_v), v, strict=True)) for j in range(len(t))]
    b = [sum(p * x for p, x in zip(softmax(scale * S[i] - kappa * H_t), t, strict=True)) for i in range(len(v))]
    local = 0.5 * sum(u[j] * unit(a[j]) @ unit(t[j]) for j in range(len(t)))
    local += 0.5 * sum(w[i] * unit(b[i]) @ unit(v[i]) for i in range(len(v)))
    whole = unit(v_g + w @ v) @ unit(t_g + u @ t) if global_input == "weighted" else v_g @ t_g
    mean_entropy = sum(np.mean(h) for h in naive_entropies(S, evidence_scale)) / 2
    return (1 - gate) * whole + gate * local - evidence_weight * mean_entropy


@functools.cache
def compiled_mefn(**options):
    """MEFN's parameters, its compiled scores of all pairs and of one pair, shared by all examples of one shape."""
    module = MEFN(**options)
    params = jax.jit(module.init)(jax.random.key(0), random_features(0, 3, N, D), random_features(1, 3, M, D))
    return params, jax.jit(module.apply), jax.jit(functools.partial(module.apply, method="explain"))


VARIANTS = [
    *((4.0, 0.2, 0.0, "weighted"), (4.0, 0.0, 0.0, "weighted"), (0.0, 0.3, 0.0, "pooled")),
    *((0.0, 0.3, 16.0, "weighted"), (1.0, 0.2, 20.0, "pooled"), (2.0, 0.4, 16.0, "pooled")),
]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), masks(3, N), masks(3, M), st.sampled_from(VARIANTS))
def test_mefn_scores_and_explain_equal_naive_loops(seed, region_mask, word_mask, variant):
    kappa, evidence_weight, own_scale, global_input = variant
    images, texts = random_features(seed, 3, N, D, region_mask), random_features(seed + 1, 3, M, D, word_mask)
    params, apply, explain = compiled_mefn(
        init_kappa=kappa,
        init_evidence_weight=evidence_weight,
        init_evidence_lambda=own_scale,
        global_input=global_input,
    )
    scores = np.asarray(apply(params, images, texts))
    for i, t in itertools.product(range(3), repeat=2):
        existing = [(f.fragments[k][f.mask[k]], f.pooled[k]) for f, k in ((images, i), (texts, t))]
        expected = naive_score(*existing, 9.0, kappa, 0.5, evidence_weight, own_scale or 9.0, global_input)
        assert scores[i, t] == pytest.approx(expected, abs=1e-5)
        image, text = jax.tree.map(lambda x, i=i: x[i], images), jax.tree.map(lambda x, t=t: x[t], texts)
        assert float(explain(params, image, text)["score"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("local", "global_input"), [("both", "weighted"), ("both", "pooled"), ("t2i", "pooled"), ("i2t", "weighted")]
)
def test_mefn_score_is_distance_of_unified_embeddings(local, global_input):
    word_mask = np.array([[1, 1, 1, 0, 0]], bool)
    images, texts = random_features(4, 1, N, D), random_features(5, 1, M, D, word_mask)
    image, text = (jax.tree.map(lambda x: x[0], f) for f in (images, texts))
    params, _, explain = compiled_mefn(local=local, global_input=global_input)
    terms = explain(params, image, text)
    f_v, f_t = unified_embeddings(image, text, terms, terms["gate"], local, global_input)
    squared_length = 1 - float(terms["evidence"])
    assert float(f_v @ f_v) == pytest.approx(squared_length, abs=1e-5)
    assert float(f_t @ f_t) == pytest.approx(squared_length, abs=1e-5)
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
        first = [jax.tree.map(lambda x: x[0], f) for f in (images, texts)]

        @jax.jit
        def compute():
            params = module.init(jax.random.key(0), images, texts)
            return module.apply(params, *first, method="explain"), module.apply(params, images, texts)[0, 0], params

        return compute()

    for name in ("mefn_no_entropy", "mefn_no_weights"):
        terms, score, params = terms_of(name)
        np.testing.assert_allclose(terms["region_weights"], 1 / N, rtol=1e-6)
        np.testing.assert_allclose(terms["word_weights"], 1 / M, rtol=1e-6)
        assert "log_kappa" not in params["params"]
        assert ("log_evidence_weight" in params["params"]) == (name == "mefn_no_weights")
    for name in ("mefn_no_entropy", "mefn_no_evidence", "mefn_paper"):
        terms, score, params = terms_of(name)
        assert float(terms["evidence"]) == 0
        assert "log_evidence_weight" not in params["params"]
        assert float(score) == pytest.approx(float(terms["local"] + terms["global"]) / 2, abs=1e-6)
    terms, score, params = terms_of("mefn_no_local")
    assert float(score) == pytest.approx(float(terms["global"] + terms["evidence"]), abs=1e-6)
    assert "gate_logit" not in params["params"]
    terms, score, _ = terms_of("mefn_no_global")
    assert float(score) == pytest.approx(float(terms["local"] + terms["evidence"]), abs=1e-6)
    terms, score, params = terms_of("mefn")
    expected = float(terms["local"] + terms["global"]) / 2 + float(terms["evidence"])
    assert float(score) == pytest.approx(expected, abs=1e-6)
    assert float(terms["evidence"]) == pytest.approx(-0.2 * float(terms["mean_entropy"]), abs=1e-6)
    assert float(jnp.sum(terms["H"])) == pytest.approx(float(terms["MFE"]), abs=1e-6)


def test_mean_entropy_is_one_without_a_choice():
    image, text = (jax.tree.map(lambda x: x[0], random_features(k, 1, 1, D)) for k in (10, 11))
    params, _, explain = compiled_mefn()
    assert float(explain(params, image, text)["mean_entropy"]) == 1.0
    without_words = text.replace(mask=np.zeros(1, bool), fragments=0 * text.fragments)
    assert float(explain(params, image, without_words)["mean_entropy"]) == 1.0


def test_captions_cut_to_one_word_are_no_nearer_the_top_than_cut_to_two():
    """A caption of one word leaves the regions no choice, and must not be paid for that."""
    rng = np.random.default_rng(0)
    images, noise = random_features(rng, 20, N, 32), random_features(rng, 100, M, 32)
    image_of_caption = np.arange(100) // 5
    words = images.fragments[image_of_caption][:, rng.integers(0, N, M)] + noise.fragments
    texts = noise.replace(fragments=unit_rows(words), pooled=unit_rows(words.sum(1)))
    module = MEFN(init_kappa=0.0, init_evidence_weight=0.4, global_input="pooled")
    params = module.init(jax.random.key(0), images, texts)
    score = jax.jit(module.apply)
    tenth_best = np.sort(np.asarray(score(params, images, texts)), 1)[:, -10, None]

    def share_near_top(length: int) -> float:
        mask = np.broadcast_to(np.arange(M) < length, texts.mask.shape)
        cut = texts.replace(mask=mask, fragments=texts.fragments * mask[..., None])
        return float(np.mean(np.asarray(score(params, images, cut)) > tenth_best))

    assert share_near_top(1) <= share_near_top(2)
