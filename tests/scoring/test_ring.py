"""Scores and losses of a batch that is sharded over devices equal those of one device, with their gradients; and so do
scores in tiles that the backward pass recomputes."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_features import length_mask, random_features
from systems import make_matcher

from mefn_jax import losses
from mefn_jax.features import Features
from mefn_jax.matching.hubness import HubnessCorrection
from mefn_jax.model import MODELS, Model
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring.ring import local_loss, ring_scores, score_in_tiles, texts_per_tile
from mefn_jax.training import step

B, N, M, D, DEVICES = 8, 3, 4, 8, 4
LOSSES = {
    "sum": functools.partial(losses.triplet, margin=0.2, hardest=0.0, anchors="both"),
    "hardest": functools.partial(losses.triplet, margin=0.2, hardest=1.0, anchors="both"),
    "info_nce": losses.info_nce,
    "siglip": losses.siglip,
}


def pairs(seed, lengths):
    """B images, and B captions of these lengths."""
    rng, ids = np.random.default_rng(seed), {"ids": jnp.arange(B)}
    mask = np.arange(M) < np.array(lengths)[:, None]
    return random_features(rng, B, N, D, extra=ids), random_features(rng, B, M, D, mask, ids)


def loss_of_scores(loss, params, scores, image_index):
    return LOSSES[loss](scores, losses.positives_mask(image_index), params["scale"], params["bias"])


@functools.cache
def make_scorer(name):
    """`score(params, images, texts)` of a matcher, and its parameters together with those of a loss."""
    matcher = make_matcher(name)
    params = matcher.init(jax.random.key(0), *pairs(0, [M] * B)) | {"scale": jnp.float32(2), "bias": jnp.float32(-3)}
    return lambda params, *features: matcher.apply({"params": params.get("params", {})}, *features), params


def vectors(images, texts):
    return images.fragments, images.pooled, texts.fragments, texts.pooled


def with_vectors(vectors, images, texts):
    images = images.replace(fragments=vectors[0], pooled=vectors[1])
    return images, texts.replace(fragments=vectors[2], pooled=vectors[3])


def four_devices():
    return make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:DEVICES])


TILE_MIB = 4 * (B // DEVICES) * N * M / 2**20  # MiB: one text at a time


@functools.cache
def compiled(name, form):
    """`(images, texts, image_index, loss) -> (loss, scores), gradients` with respect to the parameters, the fragments
    and the pooled vectors. The scores and their backward pass are compiled once for all losses, which see rows that are
    sharded over the devices."""
    score, params = make_scorer(name)

    def scores(params, vectors, images, texts):
        features = with_vectors(vectors, images, texts)
        return (
            score(params, *features)
            if form == "plain"
            else ring_scores(score, params, *features, four_devices(), TILE_MIB)
        )

    def backpropagate(params, vectors, images, texts, gradient):
        return jax.vjp(lambda *x: scores(*x, images, texts), params, vectors)[1](gradient)

    forward, backward = jax.jit(scores), jax.jit(backpropagate)

    def run(images, texts, image_index, loss):
        p = jax.tree.map(lambda x: x.astype(images.pooled.dtype), params)
        inputs = p, vectors(images, texts), images, texts
        scores = forward(*inputs)
        value, (loss_gradient, score_gradient) = value_and_grad(loss)(p, scores, image_index)
        matcher_gradient, vector_gradient = backward(*inputs, score_gradient)
        return (value, scores), (jax.tree.map(jnp.add, loss_gradient, matcher_gradient), vector_gradient)

    return run


@functools.cache
def value_and_grad(loss):
    return jax.jit(jax.value_and_grad(functools.partial(loss_of_scores, loss), (0, 1)))


def assert_close(found, expected, value=1e-6, gradient=1e-5):
    """Compares loss and scores to `value`, gradients to `gradient` of the largest in their array, or of 0.05."""
    (values, gradients), (true_values, true_gradients) = found, expected
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=value, atol=value), values, true_values)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True):
        largest = max(float(jnp.max(jnp.abs(b))), 0.05)  # a scalar's gradient is a sum of terms that mostly cancel
        np.testing.assert_allclose(a, b, rtol=0, atol=gradient * largest)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_ring_scores_equal_plain_scores_and_gradients(name):
    images, texts = pairs(1, [1, 2, 3, 4, 4, 3, 2, 1])
    image_index = jnp.array([0, 1, 2, 0, 3, 4, 2, 5])
    for loss in LOSSES:
        assert_close(
            compiled(name, "ring")(images, texts, image_index, loss),
            compiled(name, "plain")(images, texts, image_index, loss),
        )


def batch_of(low, high):
    return st.lists(st.integers(low, high), min_size=B, max_size=B)


@given(st.integers(0, 2**31), batch_of(1, M), batch_of(0, 4))
@settings(deadline=None, max_examples=15)
def test_ring_scores_equal_plain_scores_for_any_caption_lengths(seed, lengths, image_index):
    """In float64: SCAN divides a region's cosines by their norm over a caption's words, which can be arbitrarily small,
    and rounding errors of the gradient grow accordingly."""
    with jax.enable_x64(True):
        images, texts = jax.tree.map(double, pairs(seed, lengths))
        for name in ("mefn", "scan_t2i_lse"):
            ring, plain = (
                compiled(name, form)(images, texts, jnp.array(image_index), "sum") for form in ("ring", "plain")
            )
            assert_close(ring, plain, 1e-9, 1e-8)


def double(x):
    return x.astype(jnp.float64) if x.dtype == jnp.float32 else x


def test_local_loss_uses_negatives_of_its_device():
    images, texts = pairs(3, [4] * B)
    image_index = jnp.array([0, 0, 1, 2, 3, 4, 5, 5])
    score, params = make_scorer("mefn")
    loss = functools.partial(loss_of_scores, "info_nce")

    def local(params, vectors):
        features = with_vectors(vectors, images, texts)
        return local_loss(
            score, loss, params, *features, items=(image_index,), mesh=four_devices(), score_tile_mib=TILE_MIB
        ), ()

    def blocks(params, vectors):
        scores = score(params, *with_vectors(vectors, images, texts))
        shards = [slice(k, k + B // DEVICES) for k in range(0, B, B // DEVICES)]
        return sum(loss(params, scores[s, s], image_index[s]) for s in shards) / DEVICES, ()

    inputs = params, vectors(images, texts)
    assert_close(*(jax.jit(jax.value_and_grad(form, (0, 1), has_aux=True))(*inputs) for form in (local, blocks)))


@pytest.mark.parametrize("negatives", losses.LOSS_CHOICES["loss.negatives"])
def test_loss_from_features_subtracts_hub_offsets_of_sharded_batch(negatives):
    images, texts = pairs(4, [1, 2, 3, 4, 4, 3, 2, 1])
    image_index = jnp.array([0, 0, 1, 2, 3, 4, 5, 5])
    hubness = HubnessCorrection(num_vectors=4, init_scale=20.0)
    model = Model(image=None, text=None, matcher=make_matcher("vsepp"), hubness=hubness, loss={})
    hubs = hubness.init(jax.random.key(0), images.pooled, texts.pooled)["params"]
    params = {"matcher": {}, "hubness": hubs, "loss": {"scale": jnp.float32(2)}, "constants": {}}
    loss = losses.make_loss(types.SimpleNamespace(name="info_nce"))
    step_config = step.StepConfig(model, None, {}, loss, TILE_MIB, negatives)

    def sharded(params, vectors):
        features = with_vectors(vectors, images, texts)
        options = {"step_config": step_config, "mesh": four_devices()}
        return step.loss_from_features(params, *features, image_index, None, 0, **options), ()

    def plain(params, vectors):
        features = with_vectors(vectors, images, texts)
        image_offsets, text_offsets = model.hub_offsets(params, *features)
        scores = model.score(params, *features) - image_offsets[:, None] - text_offsets
        size = B if negatives == "global" else B // DEVICES
        shards = [slice(k, k + size) for k in range(0, B, size)]
        scale = params["loss"]["scale"]
        parts = [losses.info_nce(scores[s, s], losses.positives_mask(image_index[s]), scale, None) for s in shards]
        return sum(parts) / len(parts), ()

    inputs = params, vectors(images, texts)
    found, expected = (jax.jit(jax.value_and_grad(form, (0, 1), has_aux=True))(*inputs) for form in (sharded, plain))
    assert_close(found, expected)
    assert np.any(np.abs(found[1][0]["hubness"]["images"]) > 1e-5)


NUM_IMAGES, T = 5, 6


def unequal_numbers():
    """Features of five images and of six texts."""
    rng = np.random.default_rng(0)
    texts = random_features(rng, T, M, D, length_mask(rng, T, M), {"ids": np.arange(T)})
    return random_features(rng, NUM_IMAGES, N, D), texts


@pytest.mark.parametrize("name", ["mefn", "scan_t2i_lse", "vsepp"])
def test_score_in_tiles_equals_plain_scores_and_gradients(name):
    matcher = make_matcher(name)
    images, texts = unequal_numbers()
    params = matcher.init(jax.random.key(0), images, texts)

    def loss(params, v, t, mib):
        image_features = Features(v, images.mask, images.pooled)
        text_features = Features(t, texts.mask, texts.pooled, texts.extra)
        scores = score_in_tiles(lambda a, b: matcher.apply(params, a, b), image_features, text_features, mib)
        return jnp.sum(jnp.sin(3 * scores + jnp.arange(NUM_IMAGES * T).reshape(NUM_IMAGES, T))), scores

    plain, tiled = (
        jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)(
            params, images.fragments, texts.fragments, mib
        )
        for mib in (128.0, 2 * 4 * NUM_IMAGES * N * M / 2**20)
    )
    assert tiled[0][1].shape == (NUM_IMAGES, T)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, tiled)


def test_score_in_tiles_scores_one_tile_at_a_time():
    sizes = []

    def score(images, texts):
        sizes.append(texts.mask.shape[0])
        assert texts.extra["ids"].shape == (sizes[-1],)
        return jnp.zeros((NUM_IMAGES, sizes[-1]))

    images, texts = unequal_numbers()
    for fit in (1, 2, 3, 5, 6, 99):
        assert score_in_tiles(score, images, texts, fit * 4 * NUM_IMAGES * N * M / 2**20).shape == (NUM_IMAGES, T)
    assert [sizes[0], *sizes[-5:]] == [1, 2, 3, 3, 6, 6]


@given(st.integers(1, 999), st.integers(1, 300), st.integers(1, 40), st.floats(1e-6, 200))
@settings(deadline=None)
def test_texts_per_tile_divides_texts_and_fits_memory(regions, number, words, mib):
    tile = texts_per_tile(regions, (number, words), mib)
    assert number % tile == 0
    assert tile == 1 or tile * 4 * regions * words <= mib * 2**20
    larger = [k for k in range(tile + 1, number + 1) if number % k == 0]
    assert all(k * 4 * regions * words > mib * 2**20 for k in larger)
