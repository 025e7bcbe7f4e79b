"""Scores and losses of a batch that is sharded over devices equal those of one device, with their gradients."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_features import random_features
from systems import SCORES, make_matcher

from configs import default
from mefn_jax import losses
from mefn_jax.matching.hubness import HubnessCorrection
from mefn_jax.model import Model
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring.chunks import make_block_scorer
from mefn_jax.scoring.ring import local_loss, ring_scores
from mefn_jax.training import step
from mefn_jax.training.hyperparameters import hyperparameters_from_config
from mefn_jax.training.loss_inputs import EncodedBatch

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
def make_model(name):
    """A model without encoders, and the parameters of its matcher together with those of a loss."""
    model = Model(image=None, text=None, matcher=make_matcher(name), hubness=None, loss={})
    variables = model.matcher.init(jax.random.key(0), *pairs(0, [M] * B))
    return model, {"matcher": variables.get("params", {}), "scale": jnp.float32(2), "bias": jnp.float32(-3)}


def vectors(images, texts):
    return images.fragments, images.pooled, texts.fragments, texts.pooled


def with_vectors(vectors, images, texts):
    images = images.replace(fragments=vectors[0], pooled=vectors[1])
    return images, texts.replace(fragments=vectors[2], pooled=vectors[3])


def four_devices():
    return make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:DEVICES])


TILE_MIB = 4 * N * M / 2**20  # MiB: one image and one text at a time
CHUNK_MIB = B // DEVICES * TILE_MIB  # the images of a device and one text at a time


@functools.cache
def compiled(name, form):
    """`(images, texts, image_index, loss) -> (loss, scores), gradients` with respect to the parameters, the fragments
    and the pooled vectors. The scores and their backward pass are compiled once for all losses, which see rows that are
    sharded over the devices."""
    model, params = make_model(name)

    def scores(params, vectors, images, texts):
        features = with_vectors(vectors, images, texts)
        if form == "plain":
            return model.score(params, *features)
        return ring_scores(make_block_scorer(model, CHUNK_MIB, TILE_MIB), params, *features, four_devices())

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
    """Compares loss and scores to `value`, gradients to `gradient` of the largest in their array, or of 0.05. The
    gradient of a scalar is a sum of terms of about 1 that mostly cancel."""
    (values, gradients), (true_values, true_gradients) = found, expected
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=value, atol=value), values, true_values)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True):
        largest = max(float(jnp.max(jnp.abs(b))), 0.05 if b.ndim else 1.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=gradient * largest)


# Of VisITA and SFE forms that compile in a third of the time: one step, and what the ring computes of SFE. MATE trains
# on other scores (`train_score`).
RING = sorted({*SCORES, "visita_one_step", "sfe_no_external"} - {"visita", "sfe", "mate"})


@pytest.mark.parametrize("name", RING)
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
    model, params = make_model("mefn")
    score = make_block_scorer(model, CHUNK_MIB, TILE_MIB)
    loss = functools.partial(loss_of_scores, "info_nce")

    def local(params, vectors):
        features = with_vectors(vectors, images, texts)
        return local_loss(score, loss, params, *features, items=(image_index,), mesh=four_devices()), ()

    def blocks(params, vectors):
        scores = model.score(params, *with_vectors(vectors, images, texts))
        shards = [slice(k, k + B // DEVICES) for k in range(0, B, B // DEVICES)]
        return sum(loss(params, scores[s, s], image_index[s]) for s in shards) / DEVICES, ()

    inputs = params, vectors(images, texts)
    assert_close(*(jax.jit(jax.value_and_grad(form, (0, 1), has_aux=True))(*inputs) for form in (local, blocks)))


@pytest.mark.parametrize("negatives", losses.LOSS_CHOICES["loss.negatives"])
def test_loss_from_features_subtracts_hub_offsets_and_skips_equal_captions_of_sharded_batch(negatives):
    images, texts = pairs(4, [1, 2, 3, 4, 4, 3, 2, 1])
    image_index = jnp.array([0, 0, 1, 2, 3, 4, 5, 5])
    text_digest = jnp.array([[k, k % 3] for k in (1, 2, 3, 3, 4, 5, 1, 7)])  # 2 equals 3, and 0 equals 6
    hubness = HubnessCorrection(num_vectors=4, init_scale=20.0)
    model = Model(image=None, text=None, matcher=make_matcher("vsepp"), hubness=hubness, loss={})
    hubs = hubness.init(jax.random.key(0), images.pooled, texts.pooled)["params"]
    params = {"matcher": {}, "hubness": hubs, "loss": {"scale": jnp.float32(2)}, "constants": {}}
    loss = losses.make_loss(types.SimpleNamespace(name="info_nce"))
    step_config = step.StepConfig(model, None, {}, loss, CHUNK_MIB, TILE_MIB, negatives, skip_equal_captions=True)

    def sharded(params, vectors):
        features = with_vectors(vectors, images, texts)
        options = {"step_config": step_config, "mesh": four_devices()}
        encoded = EncodedBatch(model, params, *features, {"image_index": image_index, "text_digest": text_digest})
        return step.loss_from_features(encoded, None, 0, **options), ()

    def plain(params, vectors):
        features = with_vectors(vectors, images, texts)
        image_offsets, text_offsets = model.hub_offsets(params, *features)
        scores = model.score(params, *features) - image_offsets[:, None] - text_offsets
        size = B if negatives == "global" else B // DEVICES
        shards = [slice(k, k + size) for k in range(0, B, size)]
        scale = params["loss"]["scale"]
        masks = [losses.positives_mask(image_index[s], text_digest[s]) for s in shards]
        parts = [losses.info_nce(scores[s, s], mask, scale, None) for s, mask in zip(shards, masks, strict=True)]
        return sum(parts) / len(parts), ()

    inputs = params, vectors(images, texts)
    found, expected = (jax.jit(jax.value_and_grad(form, (0, 1), has_aux=True))(*inputs) for form in (sharded, plain))
    assert_close(found, expected)
    assert np.any(np.abs(found[1][0]["hubness"]["images"]) > 1e-5)


def test_loss_with_needs_of_sharded_batch_equals_that_of_one_device():
    images, texts = pairs(6, [1, 2, 3, 4, 4, 3, 2, 1])
    model = Model(image=None, text=None, matcher=make_matcher("vsepp"), hubness=None, loss={})
    params = {"matcher": {}, "hubness": {}, "loss": {}, "constants": {}}
    hyper = hyperparameters_from_config(default.get_config(), steps=10)
    config = types.SimpleNamespace(name="sel", anchors="both")
    step_config = step.StepConfig(model, None, {}, losses.make_loss(config), loss_needs=losses.LOSSES["sel"].needs)
    # The views of pairs 1 and 2 are on two devices each.
    caption = jnp.array([0, 1, 1, 2, 2, 3, 3, 4])
    rows = {"image_index": caption // 2, "caption_index": caption, "epoch": jnp.zeros(B, int)}

    def loss(mesh, vectors):
        encoded = EncodedBatch(model, params, *with_vectors(vectors, images, texts), rows)
        return step.loss_from_features(encoded, hyper, 0, step_config=step_config, mesh=mesh), ()

    meshes = four_devices(), make_mesh(devices=jax.devices()[:1])
    forms = (jax.jit(jax.value_and_grad(functools.partial(loss, mesh), has_aux=True)) for mesh in meshes)
    assert_close(*(form(vectors(images, texts)) for form in forms))
