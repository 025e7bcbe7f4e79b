"""Scores in chunks of texts and tiles of images, which the backward pass computes again, against plain scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_features import length_mask, random_features
from systems import make_matcher

from mefn_jax.features import Features
from mefn_jax.model import Model
from mefn_jax.scoring.chunks import items_per_tile, make_block_scorer, map_tiles, score_in_tiles

I, T, N, M, D = 6, 4, 3, 4, 8  # noqa: E741 (the letters of the documentation)
TILE_MIB, CHUNK_MIB = 2 * 4 * N * T * M / 2**20, 2 * 4 * I * N * M / 2**20  # two images; two texts
LIMITS = {"one chunk": (64, TILE_MIB), "one tile": (64, 64), "chunks": (CHUNK_MIB, TILE_MIB), "smallest": (1e-9, 1e-9)}


def features():
    """Features of six images and of four texts."""
    rng = np.random.default_rng(0)
    texts = random_features(rng, T, M, D, length_mask(rng, T, M), {"ids": np.arange(T)})
    return random_features(rng, I, N, D, length_mask(rng, I, N)), texts


def make_model(name, **options):
    return Model(image=None, text=None, matcher=make_matcher(name, **options), hubness=None, loss={})


def value_and_gradients(score, params, images, texts):
    """The scores, and the gradients of a function of them for parameters, fragments and pooled vectors."""

    def loss(params, v, g, t, h):
        scores = score(params, Features(v, images.mask, g), Features(t, texts.mask, h, texts.extra))
        return jnp.sum(jnp.sin(3 * scores + jnp.arange(scores.size).reshape(scores.shape))), scores

    vectors = images.fragments, images.pooled, texts.fragments, texts.pooled
    return jax.jit(jax.value_and_grad(loss, range(5), has_aux=True))(params, *vectors)


def double(tree):
    return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, tree)


def model_and_inputs(name, **options):
    """A model, its parameters, and the Features of six images and four texts, in float64: for sums in another order."""
    model, (images, texts) = make_model(name, **options), features()
    params = {"matcher": model.matcher.init(jax.random.key(0), images, texts).get("params", {})}
    return model, double(params), *double((images, texts))


NAMES = ["mefn_no_local", "mefn_no_global", "scan_t2i_lse", "scan_i2t_avg", "vsepp"]


@pytest.mark.parametrize(
    ("name", "limits"), [*(("mefn", limits) for limits in LIMITS), *((name, "chunks") for name in NAMES)]
)
def test_block_scorer_equals_plain_scores_and_gradients(name, limits):
    with jax.enable_x64(True):
        model, *inputs = model_and_inputs(name)
        scorers = model.score, make_block_scorer(model, *LIMITS[limits])
        plain, found = (value_and_gradients(score, *inputs) for score in scorers)
        assert found[0][1].shape == (I, T)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), plain, found)


def test_block_scorer_is_right_at_any_inverse_temperature():
    model, *inputs = model_and_inputs("mefn")
    params, images, texts = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, inputs)
    plain, tiled = (
        jax.jit(functools.partial(value_and_gradients, score))
        for score in (model.score, make_block_scorer(model, CHUNK_MIB, TILE_MIB))
    )
    for inverse_temperature in (1.0, 33.0, 200.0):
        params["matcher"]["log_lambda"] = jnp.log(inverse_temperature)
        expected, found = (form(params, images, texts) for form in (plain, tiled))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), expected, found)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


def largest_array(jaxpr, axis: int) -> int:
    """The size of the largest array with an axis of this length in a jaxpr, that of the whole program included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in equation.outvars]
        sizes += [int(np.prod(shape)) for shape in shapes if axis in shape]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            sizes.append(largest_array(inner, axis) if hasattr(inner, "eqns") else 0)
    return max(sizes)


@pytest.mark.parametrize("name", ["mefn", "scan_t2i_lse"])
def test_tiles_have_no_axis_of_dimensions(name):
    """In the backward pass too: its loop over the tiles of a chunk moves nothing of the size of vectors."""
    model, params, _, _ = model_and_inputs(name)
    width = 61  # a length that no other axis has
    rng = np.random.default_rng(0)
    images, texts = random_features(rng, I, N, width), random_features(rng, T, M, width)
    score = make_block_scorer(model, 64, TILE_MIB)
    jaxpr = jax.make_jaxpr(jax.grad(lambda v, p: jnp.sum(score(p, images.replace(fragments=v), texts))))(
        jnp.asarray(images.fragments), params
    )
    loops = [e for e in jaxpr.jaxpr.eqns if e.primitive.name in ("while", "scan")]
    assert loops
    for loop in loops:
        for value in loop.params.values():
            assert not hasattr(value, "jaxpr") or largest_array(value.jaxpr, width) == 0
    assert largest_array(jaxpr.jaxpr, width) >= I * N * width


def test_score_in_tiles_scores_one_tile_at_a_time():
    sizes = []

    def score(images, texts):
        sizes.append(texts.mask.shape[0])
        assert texts.extra["ids"].shape == (sizes[-1],)
        return jnp.zeros((I, sizes[-1]))

    images, texts = features()
    for fit in (1, 2, 3, 4, 99):
        assert score_in_tiles(score, images, texts, fit * 4 * I * N * M / 2**20, N * M).shape == (I, T)
    assert [sizes[0], *sizes[-4:]] == [1, 2, 2, 4, 4]


@given(st.integers(1, 300), st.integers(1, 10**6), st.floats(1e-6, 200), st.integers(1, 3))
@settings(deadline=None)
def test_items_per_tile_divides_items_and_fits_memory(number, item_bytes, mib, smallest):
    tile = items_per_tile(number, item_bytes, mib, smallest)
    assert number % tile == 0
    assert tile <= smallest or tile * item_bytes <= mib * 2**20
    larger = [k for k in range(tile + 1, number + 1) if number % k == 0]
    assert all(k * item_bytes > mib * 2**20 for k in larger)


@given(st.sampled_from([1, 2, 3, 6]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_map_tiles_equals_function_of_all_rows(size, seed):
    rng = np.random.default_rng(seed)
    by_row = {"x": rng.normal(size=(6, 3)), "mask": rng.random((6, 3)) < 0.7}
    shared = {"w": rng.normal(size=3), "offset": np.arange(3)}

    def function(by_row, shared):
        x = jnp.where(by_row["mask"], by_row["x"], 0.0) * shared["w"] + shared["offset"]
        return jnp.tanh(jnp.sum(x**2, 1, keepdims=True) * shared["w"])

    def loss(x, w, compute):
        return jnp.sum(jnp.cos(compute(by_row | {"x": x}, shared | {"w": w})))

    with jax.enable_x64(True):
        plain, tiled = (
            jax.value_and_grad(loss, (0, 1))(by_row["x"], shared["w"], compute)
            for compute in (function, functools.partial(map_tiles, function, size))
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), plain, tiled)
