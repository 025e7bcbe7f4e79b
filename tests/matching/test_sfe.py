"""SFE's external and internal steps against loops in float64, and its constants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerical_gradient import check_gradient
from random_features import masks, random_features
from systems import make_matcher

from mefn_jax.features import make_features
from mefn_jax.matching.sfe import mean_pooled_of_words
from mefn_jax.matching.systems import MODELS

N, M, D, B, K = 4, 5, 6, 3, 5
FORMS = [name for name in MODELS if name.startswith("sfe")]


def unit(x):
    norm = np.linalg.norm(x)
    return x / norm if norm > 0 else x


def softmax(x):
    e = np.exp(np.array(x) - np.max(x))
    return e / e.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def enhanced_concepts(step, edges, cues, own, other):
    """Each concept after one graph layer for each cue, averaged with the learned shares."""
    shares = softmax(step["cue_logits"]) if len(cues) > 1 else [1.0]
    rows = []
    for k in range(K):
        layers = []
        for cue in cues:
            message = sum(edges[cue][k, m] * (own if cue == "patch" else other)[m] for m in range(K))
            message = message @ step[f"{cue}_layer"]["kernel"]
            layers.append(unit(own[k] + np.where(message > 0, message, 0.2 * message)))
        rows.append(sum(share * layer for share, layer in zip(shares, layers, strict=True)))
    return rows


def enhance(step, edges, cues, own, other, in_use, fragments, pooled):
    """The external step of one item: its enhanced fragments and pooled embedding."""
    concepts, used = enhanced_concepts(step, edges, cues, own, other), np.flatnonzero(in_use)
    share, evoked, rows = sigmoid(step["share_logit"]), [], []
    for x in fragments:
        rho = softmax([np.exp(step["log_gamma"]) * (x @ unit(own[k])) for k in used])
        evoked.append(sum(weight * concepts[k] for weight, k in zip(rho, used, strict=True)))
        rows.append(unit((1 - share) * x + share * evoked[-1]))
    return np.array(rows), unit((1 - share) * pooled + share * np.mean(evoked, 0))


def naive_score(module, params, constants, v, t, v_pooled, t_pooled):
    """The score of regions `v (N, D)` and words `t (M, D)`, raw vectors without padding, and pooled ones `(D,)`."""
    v, t = np.array([unit(x) for x in v]), np.array([unit(x) for x in t])
    v_pooled, t_pooled = unit(v_pooled), unit(t_pooled)
    if module.cues:
        initial = [constants[f"{kind}_nodes"]["initial"] for kind in ("visual", "textual")]
        in_use = [np.any(x != 0, 1) for x in initial]
        visual, textual = (
            x + params[f"{kind}_nodes"]["learned"] for x, kind in zip(initial, ("visual", "textual"), strict=True)
        )
        sides = (
            ("image_step", visual, textual, in_use[0], v, v_pooled),
            ("text_step", textual, visual, in_use[1], t, t_pooled),
        )
        (v, v_pooled), (t, t_pooled) = (
            enhance(params[name], constants[name], module.cues, *rest) for name, *rest in sides
        )
    if not module.internal:
        return v_pooled @ t_pooled
    lam, gate = np.exp(params["log_lambda"]), sigmoid(params["gate_logit"])
    d = np.mean([softmax(lam * (v @ word)) for word in t], 0)
    c = np.mean([softmax(lam * (t @ region)) for region in v], 0)
    of_text, of_image = unit(d @ v), unit(c @ t)  # the contexts: regions of the text, words of the image
    image = np.concatenate([np.sqrt(1 - gate) * v_pooled, np.sqrt(gate) * of_image])
    text = np.concatenate([np.sqrt(1 - gate) * t_pooled, np.sqrt(gate) * of_text])
    assert np.linalg.norm(image) == pytest.approx(1)
    return image @ text


def random_constants(module, rng):
    """Constants as they follow from a training split: two concepts of each kind are not in use."""
    if not module.cues:
        return {}
    nodes = rng.normal(size=(2, K, D)).astype(np.float32)
    nodes[0, 3:] = nodes[1, 4:] = 0

    def edges():
        rows = lambda: rng.dirichlet(np.ones(K), K) * (rng.random((K, 1)) < 0.7)  # noqa: E731
        return {cue: rows() for cue in module.cues}

    sides = {"image_step": edges(), "text_step": edges()}
    return sides | {f"{kind}_nodes": {"initial": x} for kind, x in zip(("visual", "textual"), nodes, strict=True)}


@functools.cache
def make_form(form):
    """The module of a form, random parameters and constants, and its jitted value and gradient."""
    module, rng = make_matcher(form, concepts=K), np.random.default_rng(7)
    shapes = jax.eval_shape(module.init, jax.random.key(0), random_features(0, B, N, D), random_features(1, B, M, D))
    params = jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), shapes.get("params", {}))
    constants = jax.tree.map(lambda x: x.astype(np.float32), random_constants(module, rng))
    if module.internal:
        params["log_lambda"] = np.float32(np.log(6.0))

    def total(inputs, image_mask, text_mask):
        params, v, v_pooled, t, t_pooled = inputs
        features = make_features(v, image_mask, v_pooled), make_features(t, text_mask, t_pooled)
        scores = module.apply({"params": params, "constants": constants}, *features)
        return jnp.sum(scores * jnp.arange(1.0, 1 + B * B).reshape(B, B)), scores

    return module, params, constants, jax.jit(jax.value_and_grad(total, has_aux=True))


def check_form(form, seed, region_mask, word_mask, repeat=""):
    module, params, constants, compiled = make_form(form)
    images = random_features(seed, B, N, D, region_mask, repeat=repeat)
    texts = random_features(seed + 1, B, M, D, word_mask, repeat=repeat)

    def naive_scores(inputs):
        params, v, v_pooled, t, t_pooled = inputs
        score = functools.partial(naive_score, module, params, constants)
        rows = range(B)
        return np.array(
            [[score(v[i][region_mask[i]], t[j][word_mask[j]], v_pooled[i], t_pooled[j]) for j in rows] for i in rows]
        )

    inputs = params, images.fragments, images.pooled, texts.fragments, texts.pooled
    (_, scores), gradient = compiled(inputs, region_mask, word_mask)
    np.testing.assert_allclose(scores, naive_scores(inputs), atol=1e-5)
    weights = np.arange(1.0, 1 + B * B).reshape(B, B)
    check_gradient(lambda inputs: np.sum(weights * naive_scores(inputs)), inputs, gradient, seed)
    return gradient


ONE_OF_EACH = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 0, 1, 1]], bool)


@pytest.mark.parametrize("form", FORMS)
def test_sfe_equals_loops_with_gradients_for_all_forms(form):
    gradient = check_form(form, 2, ONE_OF_EACH[:, :N], ONE_OF_EACH)
    for path, value in jax.tree_util.tree_leaves_with_path(gradient[0]):
        assert np.any(np.abs(value) > 1e-6), path


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), masks(B, N), masks(B, M), st.sampled_from(["", "fragments", "items"]))
def test_sfe_equals_loops_with_gradients_for_any_masks(seed, region_mask, word_mask, repeat):
    """The examples include one-word texts, one-region images, and equal fragments and items."""
    check_form("sfe", seed, region_mask, word_mask, repeat)


def test_sfe_without_both_steps_is_pooled_cosine():
    images, texts = random_features(0, 2, N, D), random_features(1, 3, M, D)
    module = make_matcher("sfe", cues=(), internal=False)
    assert module.init(jax.random.key(0), images, texts) == {}
    np.testing.assert_allclose(module.apply({}, images, texts), images.pooled @ texts.pooled.T, atol=1e-6)


def test_external_step_without_share_changes_nothing_and_masks_stay_zero():
    module, params, constants, _ = make_form("sfe")
    images = random_features(5, B, N, D, ONE_OF_EACH[:, :N])
    none = params | {"image_step": params["image_step"] | {"share_logit": np.float32(-40)}}
    transform = functools.partial(module.apply, method="transform_images")
    same = transform({"params": none, "constants": constants}, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, images)
    changed = transform({"params": params, "constants": constants}, images)
    assert not np.any(np.asarray(changed.fragments)[~images.mask])
    assert np.max(np.abs(changed.fragments - images.fragments)) > 0.05
    np.testing.assert_allclose(np.linalg.norm(changed.fragments, axis=-1)[images.mask], 1, atol=1e-6)


def test_external_step_follows_order_of_fragments_and_ignores_other_items():
    module, params, constants, _ = make_form("sfe")
    images = random_features(5, B, N, D, ONE_OF_EACH[:, :N])
    transform = functools.partial(module.apply, {"params": params, "constants": constants}, method="transform_images")
    whole, order = transform(images), np.random.default_rng(0).permutation(N)
    moved = images.replace(fragments=images.fragments[:, order], mask=images.mask[:, order])
    expected = whole.replace(fragments=whole.fragments[:, order], mask=moved.mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), transform(moved), expected)
    alone = transform(jax.tree.map(lambda x: x[1:2], images))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[1:2], atol=1e-6), alone, whole)


def test_external_step_without_edges_evokes_the_concepts_themselves():
    """Each C_k is then unit(Z_k), whatever the layers' matrices: with a share near 1 and one concept in use, all
    fragments become that concept."""
    module, params, constants, _ = make_form("sfe")
    nodes = np.zeros((K, D), np.float32)
    nodes[2] = [3, 0, 4, 0, 0, 0]
    constants = constants | {
        "image_step": jax.tree.map(np.zeros_like, constants["image_step"]),
        "visual_nodes": {"initial": nodes},
    }
    params = params | {
        "visual_nodes": {"learned": np.zeros((K, D), np.float32)},
        "image_step": params["image_step"] | {"share_logit": np.float32(40)},
    }
    images = random_features(5, B, N, D)
    found = module.apply({"params": params, "constants": constants}, images, method="transform_images")
    np.testing.assert_allclose(found.fragments, np.broadcast_to(nodes[2] / 5, (B, N, D)), atol=1e-6)
    np.testing.assert_allclose(found.pooled, np.broadcast_to(nodes[2] / 5, (B, D)), atol=1e-6)


def test_gradients_are_finite_without_fragments_and_at_zero_vectors():
    _, params, _, compiled = make_form("sfe")
    mask = np.array([[0] * M, [1] + [0] * (M - 1), [1] * M], bool)  # no fragment, one, all
    v, t = (random_features(k, B, size, D).fragments.copy() for k, size in ((1, N), (2, M)))
    v[2, 1] = t[2, 0] = 0
    pooled = random_features(3, B, 1, D).pooled
    inputs = params, v, pooled, t, np.zeros_like(pooled)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(compiled(inputs, mask[:, :N], mask)))


def test_attention_columns_sum_to_one():
    module, params, constants, _ = make_form("sfe")
    image, text = (
        jax.tree.map(lambda x: x[2], random_features(k, B, L, D, ONE_OF_EACH[:, :L])) for k, L in ((1, N), (2, M))
    )
    found = np.asarray(module.apply({"params": params, "constants": constants}, image, text, method="attention"))
    np.testing.assert_allclose(found.sum(0), text.mask, atol=1e-6)
    logits = np.exp(params["log_lambda"]) * image.fragments[image.mask] @ text.fragments[text.mask].T
    np.testing.assert_allclose(found[image.mask][:, text.mask], np.exp(logits) / np.exp(logits).sum(0), atol=1e-6)


def test_mean_pooled_of_words_is_unit_and_zero_for_unused_words():
    rng = np.random.default_rng(0)
    pooled, marks = rng.normal(size=(6, D)), np.zeros((6, 3), np.float32)
    marks[:2, 0] = marks[1:4, 1] = 1
    found = mean_pooled_of_words(pooled, marks)
    np.testing.assert_allclose(found[0], unit(pooled[:2].mean(0) - pooled.mean(0)), atol=1e-6)
    assert not np.any(found[2])
