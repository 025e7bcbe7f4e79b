"""Scores and losses of a batch that is spread over devices are those of one device, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax import losses
from mefn_jax.features import make_features
from mefn_jax.model import MODELS
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring.ring import local_loss, ring_scores

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


def of_scores(loss, params, scores, owner):
    return LOSSES[loss](scores, losses.positives_mask(owner), params["scale"], params["bias"])


@functools.cache
def matched(name):
    """A matcher's `score(params, images, texts)`, and its parameters, a loss's among them."""
    cls, options = MODELS[name]
    matcher = cls(**options, **({"hub_vectors": 4} if name == "mefn" else {}))
    params = matcher.init(jax.random.key(0), *pairs(0, [M] * B)) | {"scale": jnp.float32(2), "bias": jnp.float32(-3)}
    return lambda params, *both: matcher.apply({"params": params.get("params", {})}, *both), params


def vectors(images, texts):
    return images.fragments, images.pooled, texts.fragments, texts.pooled


def with_vectors(vectors, images, texts):
    images = images.replace(fragments=vectors[0], pooled=vectors[1])
    return images, texts.replace(fragments=vectors[2], pooled=vectors[3])


def mesh():
    return make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:DEVICES])


TILE = 4 * (B // DEVICES) * N * M / 2**20  # MiB: one text at a time


@functools.cache
def compiled(name, way):
    """`(images, texts, owner, loss) -> (loss, scores), gradients` by the parameters, the fragments and pooled vectors.
    Scores and the way back from them are compiled once for all losses, which see rows split over the devices."""
    score, params = matched(name)

    def scores(params, vectors, images, texts):
        both = with_vectors(vectors, images, texts)
        return score(params, *both) if way == "plain" else ring_scores(score, params, *both, mesh(), TILE)

    def back(params, vectors, images, texts, gradient):
        return jax.vjp(lambda *x: scores(*x, images, texts), params, vectors)[1](gradient)

    forward, backward = jax.jit(scores), jax.jit(back)

    def run(images, texts, owner, loss):
        p = jax.tree.map(lambda x: x.astype(images.pooled.dtype), params)
        inputs = p, vectors(images, texts), images, texts
        found = forward(*inputs)
        value, (of_params, gradient) = _value_and_grad(loss)(p, found, owner)
        through, of_vectors = backward(*inputs, gradient)
        return (value, found), (jax.tree.map(jnp.add, of_params, through), of_vectors)

    return run


@functools.cache
def _value_and_grad(loss):
    return jax.jit(jax.value_and_grad(functools.partial(of_scores, loss), (0, 1)))


def close(found, expected, value=1e-6, gradient=1e-5):
    """Loss and scores to `value`, gradients to `gradient` of the largest of their array, or of 0.05."""
    (values, gradients), (true_values, true_gradients) = found, expected
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=value, atol=value), values, true_values)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True):
        largest = max(float(jnp.max(jnp.abs(b))), 0.05)  # a scalar's gradient is a sum in which much cancels
        np.testing.assert_allclose(a, b, rtol=0, atol=gradient * largest)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_ring_is_the_plain_form(name):
    images, texts = pairs(1, [1, 2, 3, 4, 4, 3, 2, 1])
    owner = jnp.array([0, 1, 2, 0, 3, 4, 2, 5])
    for loss in LOSSES:
        close(compiled(name, "ring")(images, texts, owner, loss), compiled(name, "plain")(images, texts, owner, loss))


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
            ring, plain = (compiled(name, way)(images, texts, jnp.array(owner), "sum") for way in ("ring", "plain"))
            close(ring, plain, 1e-9, 1e-8)


def double(x):
    return x.astype(jnp.float64) if x.dtype == jnp.float32 else x


def test_local_negatives_are_those_of_the_same_device():
    images, texts = pairs(3, [4] * B)
    owner = jnp.array([0, 0, 1, 2, 3, 4, 5, 5])
    score, params = matched("mefn")
    loss = functools.partial(of_scores, "info_nce")

    def local(params, vectors):
        both = with_vectors(vectors, images, texts)
        return local_loss(score, loss, params, *both, owner=owner, mesh=mesh(), score_tile_mib=TILE), ()

    def blocks(params, vectors):
        scores = score(params, *with_vectors(vectors, images, texts))
        some = [slice(k, k + B // DEVICES) for k in range(0, B, B // DEVICES)]
        return sum(loss(params, scores[s, s], owner[s]) for s in some) / DEVICES, ()

    inputs = params, vectors(images, texts)
    close(*(jax.jit(jax.value_and_grad(way, (0, 1), has_aux=True))(*inputs) for way in (local, blocks)))
