"""Scores and losses of a batch that is spread over devices are those of one device, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax import losses
from mefn_jax.matching.features import make_features
from mefn_jax.matching.ring import all_rows, own_rows
from mefn_jax.model import MODELS
from mefn_jax.sharding import make_mesh

B, N, M, D, DEVICES = 8, 3, 4, 8, 4
LOSSES = {
    "sum": functools.partial(losses.triplet, margin=0.2, hardest=0.0, anchors="both"),
    "hardest": functools.partial(losses.triplet, margin=0.2, hardest=1.0, anchors="both"),
    "info_nce": losses.info_nce,
    "siglip": losses.siglip,
}


def pairs(seed, lengths):
    rng = np.random.default_rng(seed)
    mask = jnp.arange(M) < jnp.asarray(lengths)[:, None]
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    images = make_features(draw(B, N, D), jnp.ones((B, N), bool), draw(B, D), {"ids": jnp.arange(B)})
    return images, make_features(draw(B, M, D), mask, draw(B, D), {"ids": jnp.arange(B)})


@functools.cache
def compiled(name, loss, way):
    """`(params, features) -> (loss, scores), gradients` by a matcher's parameters, the fragments and pooled vectors."""
    cls, options = MODELS[name]
    matcher = cls(**options, **({"background": 4} if name == "mefn" else {}))
    params = matcher.init(jax.random.key(0), *pairs(0, [M] * B)) | {"scale": jnp.float32(2), "bias": jnp.float32(-3)}

    def score(params, images, texts):
        return matcher.apply({"params": params.get("params", {})}, images, texts)

    def of_scores(params, scores, owner):
        return LOSSES[loss](scores, losses.positives_mask(owner), params["scale"], params["bias"])

    def value(params, vectors, images, texts, owner):
        images = images.replace(fragments=vectors[0], pooled=vectors[1])
        texts = texts.replace(fragments=vectors[2], pooled=vectors[3])
        if way == "plain":
            scores = score(params, images, texts)
            return of_scores(params, scores, owner), scores
        if way == "blocks":
            blocks = [slice(k, k + B // DEVICES) for k in range(0, B, B // DEVICES)]
            return sum(of_scores(params, score(params, images, texts)[b, b], owner[b]) for b in blocks) / DEVICES, ()
        mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:DEVICES])
        tile_mib = 4 * (B // DEVICES) * N * M / 2**20  # one text at a time
        if way == "local":
            return own_rows(score, of_scores, params, images, texts, owner=owner, mesh=mesh, tile_mib=tile_mib), ()
        scores = all_rows(score, params, images, texts, mesh, tile_mib)
        return of_scores(params, scores, owner), scores

    run = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))

    def on(images, texts, owner):
        return run(
            jax.tree.map(lambda x: x.astype(images.pooled.dtype), params),
            (images.fragments, images.pooled, texts.fragments, texts.pooled),
            images,
            texts,
            owner,
        )

    return on


def close(found, expected, value=1e-6, gradient=1e-5):
    """Loss and scores to `value`, gradients to `gradient` of the largest of their array, or of 0.05."""
    (values, gradients), (true_values, true_gradients) = found, expected
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=value, atol=value), values, true_values)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True):
        largest = max(float(jnp.max(jnp.abs(b))), 0.05)  # a scalar's gradient is a sum in which much cancels
        np.testing.assert_allclose(a, b, rtol=0, atol=gradient * largest)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["mefn", "scan_t2i_lse", "vsepp"])
def test_the_ring_is_the_plain_form(name, loss):
    images, texts = pairs(1, [1, 2, 3, 4, 4, 3, 2, 1])
    owner = jnp.array([0, 1, 2, 0, 3, 4, 2, 5])
    close(compiled(name, loss, "ring")(images, texts, owner), compiled(name, loss, "plain")(images, texts, owner))


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mefn", "scan_t2i_lse", "vsepp"}))
def test_the_ring_is_the_plain_form_for_the_other_matchers(name):
    images, texts = pairs(2, [4, 1, 3, 4, 2, 3, 2, 1])
    owner = jnp.arange(B) // 2
    close(compiled(name, "sum", "ring")(images, texts, owner), compiled(name, "sum", "plain")(images, texts, owner))


def each_of(low, high):
    return st.lists(st.integers(low, high), min_size=B, max_size=B)


@given(st.integers(0, 2**31), each_of(1, M), each_of(0, 4))
@settings(deadline=None, max_examples=15)
def test_captions_of_any_lengths(seed, lengths, owner):
    """In float64: SCAN divides a region's cosines by their norm over a caption's words, which can be as small as chance
    has it, and rounding grows as much in its gradient."""
    with jax.enable_x64(True):
        images, texts = jax.tree.map(double, pairs(seed, lengths))
        for name in ("mefn", "scan_t2i_lse"):
            ring, plain = compiled(name, "sum", "ring"), compiled(name, "sum", "plain")
            close(ring(images, texts, jnp.array(owner)), plain(images, texts, jnp.array(owner)), 1e-9, 1e-8)


def double(x):
    return x.astype(jnp.float64) if x.dtype == jnp.float32 else x


def test_local_negatives_are_those_of_the_same_device():
    images, texts = pairs(3, [4] * B)
    owner = jnp.array([0, 0, 1, 2, 3, 4, 5, 5])
    local, blocks = (compiled("mefn", "info_nce", way) for way in ("local", "blocks"))
    close(local(images, texts, owner), blocks(images, texts, owner))
