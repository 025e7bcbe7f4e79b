"""VisITA's Gram form against loops in float64 that form every attended and refined vector."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerical_gradient import check_gradient
from random_features import length_mask, masks, random_features
from systems import make_matcher

from mefn_jax.features import make_features
from mefn_jax.matching.scan import SCAN
from mefn_jax.matching.systems import MODELS
from mefn_jax.matching.visita import attend, form_groups, regions_as_sources, words_as_sources
from mefn_jax.scoring.layouts import region_block, to_padded

N, M, D, B = 4, 5, 6, 3
FORMS = {
    "visita": {},
    **{name: {} for name in MODELS if name.startswith("visita_")},
    "three steps, two groups": {"steps": 3, "groups": 2},
    "words attend": {"attend": "t2i"},
    "regions attend": {"attend": "i2t"},
    "groups alone": {"levels": ("groups",), "kernels": (0.5,)},
}


def unit(x):
    return x / np.linalg.norm(x)


def softmax(x):
    e = np.exp(np.array(x) - np.max(x))
    return e / e.sum()


def cosine(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / norms if norms > 0 else 0.0


def evidence_by_steps(queries, sources, lam, steps):
    """For each step, the cosine of each original query and what its refined query attends to."""
    refined, rows = list(queries), []
    for _ in range(steps):
        attended = []
        for query in refined:
            weights = softmax([lam * (query @ source) for source in sources])
            attended.append(sum(w * source for w, source in zip(weights, sources, strict=True)))
        rows.append([cosine(q, a) for q, a in zip(queries, attended, strict=True)])
        refined = [unit(q + a) for q, a in zip(queries, attended, strict=True)]
    return rows


def group_vectors(fragments, prototypes, eta):
    """The unit mean of the fragments for each prototype, weighted by a softmax of cosines with it."""
    groups = []
    for prototype in prototypes:
        weights = softmax([eta * cosine(x, prototype) for x in fragments])
        groups.append(unit(sum(w * x for w, x in zip(weights, fragments, strict=True))))
    return np.array(groups)


def apply_kernels(cosines, logits, widths):
    if not widths:
        return np.array(cosines)
    shares = softmax(logits)
    return sum(
        share * kernel(np.array(cosines))
        for share, kernel in zip(
            shares, [lambda x: x, *(lambda x, w=w: np.exp(-(1 - x) / w) for w in widths)], strict=True
        )
    )


def naive_score(module, params, v, t, v_pooled, t_pooled):
    """The score of regions `v (N, D)` and words `t (M, D)` without padding, and pooled embeddings `(D,)`."""
    v, t = np.array([unit(x) for x in v]), np.array([unit(x) for x in t])
    lam, terms = np.exp(params.get("log_lambda", 0.0)), []
    kernels = lambda level, x: apply_kernels(x, params.get(f"{level}_kernels"), module.kernels)  # noqa: E731
    directions = {"both": 2, "t2i": 1, "i2t": 1}[module.attend]

    def compare(level, v, t, steps):
        words_attend, regions_attend = evidence_by_steps(t, v, lam, steps), evidence_by_steps(v, t, lam, steps)
        for r, q in zip(words_attend, regions_attend, strict=True):
            t2i = np.mean(kernels(level, r)) if module.attend != "i2t" else 0
            i2t = np.mean(kernels(level, q)) if module.attend != "t2i" else 0
            terms.append((t2i + i2t) / directions)

    if "fragments" in module.levels:
        compare("fragments", v, t, module.steps)
    if "groups" in module.levels:
        eta = np.exp(params["log_eta"])
        groups = [
            group_vectors(x, params[f"{kind}_prototypes"]["vectors"], eta) for x, kind in ((v, "region"), (t, "word"))
        ]
        compare("groups", *groups, 1)
    if "whole" in module.levels:
        terms.append(kernels("whole", unit(v_pooled) @ unit(t_pooled)))
    shares = softmax(params["term_logits"]) if len(terms) > 1 else [1.0]
    return sum(share * term for share, term in zip(shares, terms, strict=True))


@functools.cache
def make_form(form):
    """The module of a form, its parameters with random values, and `(inputs, image_mask, text_mask) -> scores`, jitted
    with its gradient; `inputs` are the parameters and the raw vectors of images and of texts."""
    module = make_matcher(form if form in MODELS else "visita", **FORMS[form])
    example = random_features(0, B, N, D), random_features(1, B, M, D)
    shapes, rng = jax.eval_shape(module.init, jax.random.key(0), *example).get("params", {}), np.random.default_rng(7)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    params |= {
        name: np.float32(np.log(value)) for name, value in (("log_lambda", 6.0), ("log_eta", 3.0)) if name in params
    }

    def total(inputs, image_mask, text_mask):
        params, v, v_pooled, t, t_pooled = inputs
        features = make_features(v, image_mask, v_pooled), make_features(t, text_mask, t_pooled)
        scores = module.apply({"params": params}, *features)
        return jnp.sum(scores * jnp.arange(1.0, 1 + B * B).reshape(B, B)), scores

    return module, params, jax.jit(jax.value_and_grad(total, has_aux=True))


def check_form(form, seed, region_mask, word_mask, repeat=""):
    module, params, compiled = make_form(form)
    images = random_features(seed, B, N, D, region_mask, repeat=repeat)
    texts = random_features(seed + 1, B, M, D, word_mask, repeat=repeat)
    inputs = params, images.fragments, images.pooled, texts.fragments, texts.pooled

    def naive_scores(inputs):
        params, v, v_pooled, t, t_pooled = inputs
        return np.array(
            [
                [
                    naive_score(module, params, v[i][region_mask[i]], t[j][word_mask[j]], v_pooled[i], t_pooled[j])
                    for j in range(B)
                ]
                for i in range(B)
            ]
        )

    # Masked vectors are zero; so that they have a length, they get one.
    inputs = jax.tree.map(np.asarray, inputs)
    (_, scores), gradient = compiled(inputs, region_mask, word_mask)
    np.testing.assert_allclose(scores, naive_scores(inputs), atol=1e-5)
    weights = np.arange(1.0, 1 + B * B).reshape(B, B)
    check_gradient(lambda inputs: np.sum(weights * naive_scores(inputs)), inputs, gradient, seed)


ONE_OF_EACH = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 0, 1, 1]], bool)


@pytest.mark.parametrize("form", FORMS)
def test_visita_equals_loops_with_gradients_for_all_options(form):
    for repeat in ("", "fragments"):
        check_form(form, 2, ONE_OF_EACH[:, :N], ONE_OF_EACH, repeat)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), masks(B, N), masks(B, M), st.sampled_from(["", "fragments", "items"]))
def test_visita_equals_loops_with_gradients_for_any_masks(seed, region_mask, word_mask, repeat):
    """The examples include one-word texts, one-region images, and equal fragments and items."""
    check_form("visita", seed, region_mask, word_mask, repeat)


def test_visita_gives_every_parameter_a_gradient():
    for form in FORMS:
        _, params, compiled = make_form(form)
        images, texts = random_features(3, B, N, D), random_features(4, B, M, D)
        inputs = params, images.fragments, images.pooled, texts.fragments, texts.pooled
        _, gradient = compiled(inputs, images.mask, texts.mask)
        for path, value in jax.tree_util.tree_leaves_with_path(gradient[0]):
            assert np.all(np.max(np.abs(value), -1) > 1e-6), (form, path)


def test_visita_no_cross_with_linear_kernel_is_pooled_cosine():
    images, texts = random_features(0, 2, N, D), random_features(1, 3, M, D)
    module = make_matcher("visita_no_cross", kernels=())
    assert module.init(jax.random.key(0), images, texts) == {}
    np.testing.assert_allclose(module.apply({}, images, texts), images.pooled @ texts.pooled.T, atol=1e-6)


def test_attend_of_cancelled_query_is_finite():
    """A word that is the opposite of the only region: the refined query is the zero vector."""
    v = np.zeros((1, 1, D), np.float32)
    v[..., 0] = 1

    def evidence(v, t):
        features = make_features(v, np.ones((1, 1), bool), v[:, 0]), make_features(t, np.ones((1, 1), bool), t[:, 0])
        layouts = region_block(features[0]), to_padded(features[1])
        S = layouts[1].multiply(layouts[0], with_pooled=False).S
        sources = regions_as_sources(layouts[0]), words_as_sources(layouts[1])
        return sum(jnp.sum(x) for s in sources for x in attend(S, s, 9.0, 3)[0])

    value, gradients = jax.jit(jax.value_and_grad(evidence, (0, 1)))(v, -v)
    assert float(value) == pytest.approx(-6.0)  # three steps in each direction
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_visita_limits_inverse_temperature_but_not_its_gradient():
    module, params, compiled = make_form("visita")
    images, texts = random_features(3, B, N, D), random_features(4, B, M, D)
    vectors = images.fragments, images.pooled, texts.fragments, texts.pooled
    results = [
        compiled((params | {"log_lambda": np.float32(np.log(x))}, *vectors), images.mask, texts.mask) for x in (32, 1e4)
    ]
    np.testing.assert_allclose(results[1][0][1], results[0][0][1], atol=1e-6)
    assert abs(float(results[1][1][0]["log_lambda"])) > 1e-4
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(results))
    assert float(module.apply({"params": params | {"log_lambda": np.log(1e4)}}, method="scalars")["lambda"]) == 32


def test_kernels_are_positive_semidefinite_and_increase_to_one():
    module = make_matcher("visita_no_cross")
    rng = np.random.default_rng(0)
    params = {"params": {"whole_kernels": rng.normal(size=3)}}
    apply = functools.partial(module.apply, params, "whole", method="_apply_kernels")
    x = random_features(1, 1, 30, D).fragments[0]
    assert np.linalg.eigvalsh(np.asarray(apply(x @ x.T), np.float64)).min() > -1e-5
    values = np.asarray(apply(np.linspace(-1, 1, 50)))
    assert np.all(np.diff(values) > 0)
    assert values[-1] == pytest.approx(1.0)


def test_one_group_without_temperature_is_mean_fragment():
    images, texts = random_features(1, 2, N, D, ONE_OF_EACH[:2, :N]), random_features(2, 3, M, D, ONE_OF_EACH)
    ones = lambda vectors: jnp.ones((*vectors.shape[:-1], 1))  # noqa: E731
    regions, words = region_block(images, ones), to_padded(texts, ones)
    S = words.multiply(regions, with_pooled=False).S
    cosines, groups, _ = form_groups(S, regions, words, 0.0)
    means = [x.fragments.sum(1) / np.linalg.norm(x.fragments.sum(1), axis=1, keepdims=True) for x in (images, texts)]
    np.testing.assert_allclose(cosines[:, 0, 0], means[0] @ means[1].T, atol=1e-6)
    np.testing.assert_allclose(groups.gram, np.ones((2, 1, 1)), atol=1e-6)


def test_order_of_prototypes_and_of_fragments_does_not_matter():
    _, params, compiled = make_form("visita")
    images, texts = random_features(1, B, N, D, ONE_OF_EACH[:, :N]), random_features(2, B, M, D, ONE_OF_EACH)
    rng = np.random.default_rng(0)

    def reorder(features):
        order = rng.permutation(features.mask.shape[1])
        return features.replace(fragments=features.fragments[:, order], mask=features.mask[:, order])

    moved = params | {
        f"{kind}_prototypes": {"vectors": rng.permutation(params[f"{kind}_prototypes"]["vectors"])}
        for kind in ("region", "word")
    }

    def score(params, v, t):
        return compiled((params, v.fragments, v.pooled, t.fragments, t.pooled), v.mask, t.mask)[0][1]

    scores = score(params, images, texts)
    np.testing.assert_allclose(score(moved, reorder(images), reorder(texts)), scores, atol=1e-6)
    assert np.ptp(scores) > 0.05


class PlainSCAN(SCAN, kw_only=True):
    """SCAN with a plain softmax of cosines: without the leaky ReLU and the scaling of rows."""

    def _attention_weights(self, S, regions, words):
        return jnp.exp(self.inverse_temperature * S + regions.log_mask_for(words))


def test_one_step_with_linear_kernel_is_mean_of_both_plain_scans():
    images, texts = random_features(1, B, N, D, ONE_OF_EACH[:, :N]), random_features(2, B, M, D, ONE_OF_EACH)
    scans = [PlainSCAN(direction=direction, aggregate="avg", inverse_temperature=6.0) for direction in ("t2i", "i2t")]
    expected = sum(np.asarray(scan.apply({}, images, texts)) for scan in scans) / 2
    module = make_matcher("visita_one_level", steps=1, kernels=())
    found = module.apply({"params": {"log_lambda": np.log(6.0)}}, images, texts)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_gradients_are_finite_without_fragments_and_at_zero_vectors():
    _, params, compiled = make_form("visita")
    mask = np.array([[0] * M, [1] + [0] * (M - 1), [1] * M], bool)  # no fragment, one, all
    v, t = (random_features(k, B, size, D).fragments.copy() for k, size in ((1, N), (2, M)))
    v[2, 1] = t[2, 0] = 0
    pooled = random_features(3, B, 1, D).pooled
    inputs = params, v, pooled, t, np.zeros_like(pooled)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(compiled(inputs, mask[:, :N], mask)))


@pytest.mark.parametrize("attend_option", ["both", "i2t"])
def test_attention_is_that_of_last_step(attend_option):
    module, params, _ = make_form("visita")
    module = module.clone(attend=attend_option)
    image, text = (
        jax.tree.map(lambda x: x[0], random_features(k, 1, size, D, length_mask(k, 1, size)))
        for k, size in ((1, N), (2, M))
    )
    found = np.asarray(module.apply({"params": params}, image, text, method="attention"))
    lam, v, t = np.exp(params["log_lambda"]), *(x.fragments[x.mask].astype(float) for x in (image, text))
    queries, sources = (v, t) if attend_option == "i2t" else (t, v)
    for _ in range(module.steps):
        weights = np.array([softmax([lam * (q @ s) for s in sources]) for q in queries])
        queries = [unit(q + a) for q, a in zip(queries, weights @ sources, strict=True)]
    weights = weights if attend_option == "i2t" else weights.T  # (N, M)
    expected = np.zeros((N, M))
    expected[np.ix_(image.mask, text.mask)] = weights / weights.sum(0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
