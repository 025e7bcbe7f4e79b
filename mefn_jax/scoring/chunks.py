"""Scores all pairs on one device in training, with a custom backward pass (docs/method.md, section 12).

For a matcher with `score_products`, inner products are made for a chunk of texts at a time, by large matrix products.
Within a chunk, scores are functions of arrays without an axis of D dimensions, and are computed for a tile of a few
images at a time that fits into a processor's cache. The backward pass computes a tile again from the products of its
chunk, and writes their gradients over them. The gradients of the vectors are then two matrix products a chunk, one for
the images and one for the texts. Any other matcher is scored for a tile of texts at a time.
"""

import functools

import jax
import jax.numpy as jnp

from mefn_jax.features import Features
from mefn_jax.scoring.layouts import region_block, separate_vectors, to_padded

SMALLEST_TILE = 2  # images: XLA's sums over arrays of a single image are 30 times slower on a CPU


def make_block_scorer(model, chunk_mib: float, tile_mib: float):
    """Returns `score(params, images, texts)`, float32 `(I, T)`, which computes `model.score` of the Features of one
    device within the limits of `score_in_chunks` or, for a matcher without `score_products`, of `score_in_tiles`. If
    the matcher has a `train_score`, it computes that instead."""

    def score(params, images: Features, texts: Features):
        if model.has_products:
            return score_in_chunks(model, params, images, texts, chunk_mib, tile_mib)
        if model.has_train_score:  # cheap: there is nothing to cut
            return model.train_score(params, images, texts)
        floats_per_pair = model.floats_per_pair(images, texts)
        return score_in_tiles(functools.partial(model.score, params), images, texts, tile_mib, floats_per_pair)

    return score


def score_in_chunks(model, params, images: Features, texts: Features, chunk_mib: float, tile_mib: float) -> jax.Array:
    """Computes `model.score(params, images, texts)`, float32 `(I, T)`, from inner products.

    A float32 array of regions by words takes at most `chunk_mib` MiB in a chunk and `tile_mib` in a tile, which is part
    of one (docs/method.md, Eq. 50). Several chunks are each computed again in the backward pass; the products of a
    single one are kept.
    """
    project_regions, project_words = (functools.partial(project, params) for project in model.projections)
    regions = region_block(images, project_regions)

    def score_chunk(texts: Features):
        layouts = regions, to_padded(texts, project_words)
        products, images_rest, words = separate_vectors(*layouts, model.matcher.uses_pooled_products)
        by_image, by_text = (products, images_rest), (params, words)
        image_bytes = 4 * images.mask.shape[1] * texts.mask.size
        tile_size = items_per_tile(len(images.mask), image_bytes, tile_mib, SMALLEST_TILE)

        def score_tile(by_image, by_text):
            (products, regions), (params, words) = by_image, by_text
            return model.score_products(params, products, regions, words)

        return map_tiles(score_tile, tile_size, by_image, by_text)

    return _map_texts(score_chunk, images, texts, chunk_mib, images.mask.shape[1] * texts.mask.shape[1])


def score_in_tiles(score, images: Features, texts: Features, tile_mib: float, floats_per_pair: int) -> jax.Array:
    """Computes `score(images, texts)`, float32 `(I, T)`, for a tile of texts at a time. The backward pass computes each
    tile again. A float32 array of all images by the texts of a tile by `floats_per_pair` (those of
    `Matcher.floats_per_pair`) takes at most `tile_mib` MiB (docs/method.md, Eq. 50); all texts are one tile if they
    fit."""
    return _map_texts(functools.partial(score, images), images, texts, tile_mib, floats_per_pair)


def _map_texts(score, images: Features, texts: Features, mib: float, floats_per_pair: int) -> jax.Array:
    """Computes `score(texts)`, `(I, T)`, for as many texts at a time as `items_per_tile` allows."""
    size = items_per_tile(len(texts.mask), 4 * len(images.mask) * floats_per_pair, mib)
    number = len(texts.mask) // size
    if number == 1:
        return score(texts)
    parts = jax.tree.map(lambda x: x.reshape(number, size, *x.shape[1:]), texts)
    scores = jax.lax.map(jax.checkpoint(score), parts)  # (number, I, size)
    return jnp.moveaxis(scores, 0, 1).reshape(len(images.mask), -1)


def items_per_tile(items: int, item_bytes: int, mib: float, smallest: int = 1) -> int:
    """Returns the largest divisor of a number of items with which they fit into `mib` MiB, or which is at most
    `smallest` (docs/method.md, Eq. 50)."""
    most = max(smallest, mib * 2**20 / item_bytes)
    return max(k for k in range(1, items + 1) if items % k == 0 and (k == 1 or k <= most))


def map_tiles(function, size: int, by_row, shared) -> jax.Array:
    """Computes `function(by_row, shared)`, an array `(I, ...)` whose row depends on the same row of the arrays of
    `by_row` alone, for `size` rows at a time, a divisor of I.

    The backward pass computes a tile again, and then writes the gradient of its rows in their place, so that it needs
    no second set of arrays of that size.
    """
    by_row, shared = jax.tree.map(jnp.asarray, (by_row, shared))
    rows = len(jax.tree.leaves(by_row)[0])
    if size == rows:
        return jax.checkpoint(function)(by_row, shared)
    by_tile = jax.tree.map(lambda x: x.reshape(rows // size, size, *x.shape[1:]), by_row)
    floats, rest = split_floats(by_tile)
    shared_floats, shared_rest = split_floats(shared)

    def compute(floats, rest, shared_floats, shared_rest):
        return function(merge_floats(floats, rest), merge_floats(shared_floats, shared_rest))

    @jax.custom_vjp
    def run(floats, rest, shared_floats, shared_rest):
        return jax.lax.map(lambda tile: compute(*tile, shared_floats, shared_rest), (floats, rest))

    def forward(*inputs):
        return run(*inputs), inputs

    def backward(inputs, gradient):
        floats, rest, shared_floats, shared_rest = inputs

        def take(tree, k):
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), tree)

        def put(tree, values, k):
            return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, k, 0), tree, values)

        def differentiate(inputs):
            tile, tile_rest, tile_gradient = inputs
            _, vjp = jax.vjp(lambda tile, shared: compute(tile, tile_rest, shared, shared_rest), tile, shared_floats)
            return vjp(tile_gradient)

        def replace_tile(k, carry):
            floats, shared_gradient = carry
            tile = take((floats, rest, gradient), k)
            # This branch is always taken. XLA makes copies of the tile for it, and can then overwrite its rows; without
            # it, XLA reads the tile at several places, and copies all arrays instead.
            tile, added = jax.lax.cond(k >= 0, differentiate, lambda inputs: (inputs[0], zeros), tile)
            return put(floats, tile, k), jax.tree.map(jnp.add, shared_gradient, added)

        zeros = jax.tree.map(jnp.zeros_like, shared_floats)
        floats, shared_gradient = jax.lax.fori_loop(0, rows // size, replace_tile, (floats, zeros))
        return floats, None, shared_gradient, None

    run.defvjp(forward, backward)
    values = run(floats, rest, shared_floats, shared_rest)
    return values.reshape(rows, *values.shape[2:])


def split_floats(tree):
    """Splits a tree into the arrays that have gradients and the rest (masks, ids), with None in the other's places."""
    is_float = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), tree)
    return (
        jax.tree.map(lambda x, yes: x if yes else None, tree, is_float),
        jax.tree.map(lambda x, yes: None if yes else x, tree, is_float),
    )


def merge_floats(floats, rest):
    """Merges the two trees of `split_floats` again."""
    return jax.tree.map(lambda a, b: b if a is None else a, floats, rest, is_leaf=lambda x: x is None)
