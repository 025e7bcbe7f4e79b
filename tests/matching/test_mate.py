"""MATE's fusion network against loops in float64 and PyTorch's TransformerEncoder, its fast form, and its bound."""

import functools
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerical_gradient import check_gradient
from random_features import random_features
from systems import make_matcher

from mefn_jax.features import Features, make_features, unit
from mefn_jax.matching.mate import cosine_of_halves, fuse_pairs, score_fused
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring.certificate import ROUNDING
from mefn_jax.scoring.ring import ring_scores

D, H, LAYERS, I, T = 6, 10, 2, 3, 4  # noqa: E741 (the letters of the documentation)
SHARE = 0.1


def norm(x, scale, bias):
    x = x - np.mean(x)
    return x / np.sqrt(np.mean(x * x) + 1e-5) * scale + bias


def naive_fuse(params, v, t):
    """The unit vector [p; q] of one pair."""
    x = np.concatenate([v, t])
    for k in range(len(params)):
        w = params[f"layer_{k}"]
        value = x @ w["value_kernel"] + w["value_bias"]
        attended = value @ w["output_kernel"] + w["output_bias"]
        x = norm(x + attended, w["attention_norm_scale"], w["attention_norm_bias"])
        hidden = np.maximum(x @ w["hidden_kernel"] + w["hidden_bias"], 0)
        x = norm(x + hidden @ w["back_kernel"] + w["back_bias"], w["mlp_norm_scale"], w["mlp_norm_bias"])
    return x / np.linalg.norm(x)


def naive_score(params, v, t, share=SHARE):
    v, t = v / np.linalg.norm(v), t / np.linalg.norm(t)
    p, q = np.split(naive_fuse(params, v, t), 2)
    return ((1 - share) * v + share * p) @ ((1 - share) * t + share * q)


def as_features(pooled):
    """Features of pooled vectors, with one fragment each."""
    return make_features(pooled[:, None], jnp.ones((len(pooled), 1), bool), pooled)


@functools.cache
def make_mate(layers=LAYERS):
    """The matcher and random parameters, all of them, with a seed of their own."""
    module, rng = make_matcher("mate", layers=layers, mlp_width=H), np.random.default_rng(3)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *map(as_features, np.ones((2, 2, D), np.float32)))["params"]
    return module, jax.tree.map(lambda x: (0.6 * rng.normal(size=x.shape)).astype(np.float32), shapes)


@functools.cache
def compiled_value(layers):
    def total(inputs):
        params, v, t = inputs
        scores = make_mate(layers)[0].apply({"params": params}, as_features(v), as_features(t))
        return jnp.sum(scores * jnp.arange(1.0, 1 + I * T).reshape(I, T)), scores

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("case", ["random", "equal items", "opposite"])
def test_score_of_all_pairs_equals_loops_with_gradients(layers, case):
    rng = np.random.default_rng(layers)
    v, t = (rng.normal(size=(number, D)).astype(np.float32) for number in (I, T))
    if case == "equal items":
        v[:], t[:] = v[0], v[0]
    if case == "opposite":
        t[:I] = -v
    inputs = make_mate(layers)[1], v, t

    def naive_scores(inputs):
        params, v, t = inputs
        return np.array([[naive_score(params, v[i], t[j]) for j in range(T)] for i in range(I)])

    (_, scores), gradient = compiled_value(layers)(inputs)
    np.testing.assert_allclose(scores, naive_scores(inputs), atol=1e-5)
    weights = np.arange(1.0, 1 + I * T).reshape(I, T)
    check_gradient(lambda inputs: np.sum(weights * naive_scores(inputs)), inputs, gradient, 0)
    used = jax.tree.map(lambda x: bool(np.max(np.abs(x)) > 1e-6), gradient[0])
    assert all(jax.tree.leaves(used)), used


@pytest.mark.parametrize("layers", [1, 2])
def test_separable_first_layer_equals_fusion_of_each_pair(layers):
    module, params = make_mate(layers)
    images, texts = random_features(0, I, 1, D), random_features(1, T, 1, D)
    layers = module.apply({"params": params}, D, method="_weights")
    pairs = jnp.broadcast_arrays(images.pooled[:, None], texts.pooled[None])
    expected = score_fused(*pairs, fuse_pairs(layers, *pairs), module.share)
    np.testing.assert_allclose(module.apply({"params": params}, images, texts), expected, atol=1e-5)
    found = module.apply({"params": params}, *pairs, method="fused_similarity")
    p, q = np.split(np.array([[naive_fuse(params, v, t) for t in texts.pooled] for v in images.pooled]), 2, -1)
    cosines = np.sum(p * q, -1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(q, axis=-1)
    np.testing.assert_allclose(found, cosines, atol=1e-5)


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed; the loops replace it")
def test_fuse_equals_torch_transformer_encoder_over_one_key():
    import torch

    heads, width = 4, 2 * D
    layer = torch.nn.TransformerEncoderLayer(
        width, heads, H, dropout=0.0
    )  # queries and keys stay random: they are dead
    encoder = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()
    rng, params = np.random.default_rng(5), {}
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.copy_(torch.from_numpy(0.6 * rng.normal(size=tuple(weight.shape)).astype(np.float32)))
    for k, source in enumerate(encoder.layers):
        attention, value = source.self_attn, slice(2 * width, 3 * width)
        affine = {
            "value": (attention.in_proj_weight[value], attention.in_proj_bias[value]),
            "output": (attention.out_proj.weight, attention.out_proj.bias),
            "hidden": (source.linear1.weight, source.linear1.bias),
            "back": (source.linear2.weight, source.linear2.bias),
        }
        norms = {"attention_norm": source.norm1, "mlp_norm": source.norm2}
        tensors = {f"{n}_kernel": w.T for n, (w, _) in affine.items()} | {
            f"{n}_bias": b for n, (_, b) in affine.items()
        }
        tensors |= {f"{n}_scale": x.weight for n, x in norms.items()} | {f"{n}_bias": x.bias for n, x in norms.items()}
        params[f"layer_{k}"] = {name: x.detach().numpy() for name, x in tensors.items()}
    v, t = rng.normal(size=(2, 5, D)).astype(np.float32)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(np.concatenate([v, t], 1))[None]).numpy()[0]  # (1, batch, 2D): one position
    layers = make_mate()[0].apply({"params": params}, D, method="_weights")
    np.testing.assert_allclose(fuse_pairs(layers, v, t), expected, atol=2e-5)


def test_fusion_attends_as_attention_with_heads_over_one_key():
    """Flax's attention, with random queries and keys: over a single key they have no effect. So CI, which has no torch,
    compares with an attention as well."""
    heads, width, rng = 4, 2 * D, np.random.default_rng(6)
    attention = nn.MultiHeadDotProductAttention(heads)
    x = rng.normal(size=(5, 1, width)).astype(np.float32)  # a sequence of length 1
    shapes = jax.eval_shape(attention.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    maps, params = variables["params"], make_mate(1)[1]["layer_0"].copy()
    for name, source in (("value", maps["value"]), ("output", maps["out"])):
        params[f"{name}_kernel"] = source["kernel"].reshape(width, width)
        params[f"{name}_bias"] = source["bias"].reshape(width)
    (layer,) = make_mate(1)[0].apply({"params": {"layer_0": params}}, D, method="_weights")
    np.testing.assert_allclose(layer.attend(x), x + attention.apply(variables, x), atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.floats(0, 0.95), st.integers(1, 5), st.sampled_from(["random", "aligned", "zero"]))
def test_score_lies_within_bound_whatever_the_fusion(seed, share, width, kind):
    rng = np.random.default_rng(seed)
    v, t = (unit(rng.normal(size=(20, width))) for _ in range(2))
    y = rng.normal(size=(20, 2 * width))
    if kind == "aligned":  # the fused halves in the directions that raise the score most
        y = np.concatenate([t, v], 1) + 0.1 * y
    if kind == "zero":
        y[:] = 0
    module = make_matcher("mate", share=share)
    factor, radius = module.apply({}, method="score_bound")
    scores = score_fused(*map(jnp.float32, (v, t, y)), share)
    assert np.all(np.abs(scores - factor * np.sum(v * t, 1)) <= radius + 1e-6)
    assert np.all(np.abs(scores) <= 1 + 1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_certificate_allows_for_rounding_where_the_bound_is_reached(share):
    """With v = t and p = q = v / sqrt(2), the score is the largest possible one. Centers are products by NumPy, scores
    sums by JAX, both in float32."""
    v = unit(jnp.float32(np.random.default_rng(0).normal(size=(300, 1024))))
    factor, radius = make_matcher("mate", share=share).apply({}, method="score_bound")
    centers = np.diagonal((np.float32(factor) * np.asarray(v)) @ np.asarray(v).T)
    above = np.asarray(jax.jit(functools.partial(score_fused, share=share))(v, v, jnp.concatenate([v, v], 1))) - centers
    np.testing.assert_allclose(above, radius, atol=ROUNDING / 4)


def test_bound_of_published_share():
    factor, radius = make_matcher("mate").apply({}, method="score_bound")
    assert (factor, radius) == (pytest.approx(0.81), pytest.approx(0.1323, abs=5e-5))


def test_cosine_of_halves_has_finite_gradients_at_extremes():
    y = jnp.array([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, -1.0, -2.0]])
    value, gradient = jax.value_and_grad(lambda y: jnp.sum(cosine_of_halves(y) * jnp.arange(1, 5)))(y)
    assert float(value) == pytest.approx(1 - 4)
    assert np.all(np.isfinite(gradient))


def test_scores_of_sub_gallery_are_the_sub_matrix():
    """Permuted, cut, and padded with zeros and with other items: a score depends on its image and its text alone."""
    module, params = make_mate()
    score = jax.jit(functools.partial(module.apply, {"params": params}))
    images, texts = random_features(0, 7, 3, D), random_features(1, 9, 4, D)
    scores, rng = np.asarray(score(images, texts)), np.random.default_rng(2)
    rows, columns = rng.permutation(7)[:4], rng.permutation(9)[:5]

    def take(features, positions, padding):
        return jax.tree.map(lambda x: np.concatenate([x[positions], 0 * x[:padding]]), features)

    for padding in (0, 3):
        found = score(take(images, rows, padding), take(texts, columns, padding))
        np.testing.assert_allclose(found[:4, :5], scores[np.ix_(rows, columns)], atol=1e-6)
        assert np.all(np.isfinite(found))
    mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    four = [jax.tree.map(lambda x: x[:4], features) for features in (images, texts)]
    by_ring = ring_scores(lambda p, v, t: module.apply({"params": p}, v, t), params, *four, mesh)
    np.testing.assert_allclose(by_ring, scores[:4, :4], atol=1e-6)
    for i in range(3):
        one = score(take(images, [i], 0), take(texts, [i], 0))
        np.testing.assert_allclose(one[0, 0], scores[i, i], atol=1e-6)


def test_trained_fusion_leaves_unrelated_items_at_chance():
    """A fusion that is trained to score given random pairs high, and others low, says nothing about new random pairs:
    nothing about which item belongs to which reaches a score but the items themselves."""
    module, params = make_matcher("mate", layers=1, mlp_width=32, share=0.9), None
    rng = np.random.default_rng(0)
    train = [random_features(rng, 24, 1, 8) for _ in range(2)]
    params = module.init(jax.random.key(0), *train)["params"]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        def loss(params):
            scores = module.apply({"params": params}, *train)
            return jnp.mean(jax.nn.logsumexp(30 * scores, 1) - 30 * jnp.diagonal(scores))

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    def recall(images: Features, texts: Features) -> float:
        scores = module.apply({"params": params}, images, texts)
        return float(np.mean(np.argmax(scores, 1) == np.arange(len(scores))))

    state = optimizer.init(params)
    for _ in range(300):
        params, state = step(params, state)
    assert recall(*train) > 0.8
    new = [random_features(rng, 200, 1, 8) for _ in range(2)]
    assert recall(*new) < 0.03  # chance is 0.005
