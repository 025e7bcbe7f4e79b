"""Scores of all pairs of a batch that is spread over devices, so that negatives come from every one of them.

Each device keeps its images. The texts go round: at each hop a device scores its images against the texts that it has
just now and sends them on, and after as many hops as there are devices they are home again. So no device ever holds
the fragments of the whole batch (a ring, as in Liu et al. 2023, Ring Attention). Backwards they go round once more,
with their gradients. Letters: n devices, I images and T texts a device.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mefn_jax.features import Features


def ring_scores(score, params, images: Features, texts: Features, mesh, score_tile_mib: float) -> jax.Array:
    """`score(params, images, texts)` of the global batch, float32 `(B, B)`, its rows split over all axes of `mesh`.

    Differentiable by the parameters and the features; `score_tile_mib` as for `recomputed`, on a device. B is a multiple of
    the number of devices.
    """
    if mesh.size == 1:
        return score_in_tiles(functools.partial(score, params), images, texts, score_tile_mib)

    def block(params, images, texts):
        return score_in_tiles(functools.partial(score, params), images, texts, score_tile_mib)

    rows = PartitionSpec(mesh.axis_names)
    ring = functools.partial(_ring, block, mesh.axis_names, mesh.size)
    return jax.shard_map(ring, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=rows)(params, images, texts)


def local_loss(
    score, loss, params, images: Features, texts: Features, *, owner, mesh, score_tile_mib: float
) -> jax.Array:
    """The mean over devices of `loss(params, scores, owner)`, where each device scores its own pairs alone."""

    def local(params, images, texts, owner):
        scores = score_in_tiles(functools.partial(score, params), images, texts, score_tile_mib)
        return jax.lax.pmean(loss(params, scores, owner), mesh.axis_names)

    rows, everywhere = PartitionSpec(mesh.axis_names), PartitionSpec()
    specs = (everywhere, rows, rows, rows)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=everywhere)(params, images, texts, owner)


def _ring(block, axes, n: int, params, images, texts):
    """This device's rows `(I, n T)`."""

    def vary(tree):  # of what is the same everywhere: each device has a gradient of its own, and they are added up
        return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree)

    def send(tree):
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, [(k, (k - 1) % n) for k in range(n)]), tree)

    def column(hop, texts):
        """Where in the rows the texts belong that are here after so many hops."""
        return (jax.lax.axis_index(axes) + hop) % n * texts.mask.shape[0]

    def rows_of(params, images, texts):
        def one(carry, hop):
            texts, rows = carry
            scores = block(params, images, texts)
            rows = jax.lax.dynamic_update_slice(rows, scores, (0, column(hop, texts)))
            return (send(texts), rows), None

        empty = vary(jnp.zeros((images.mask.shape[0], n * texts.mask.shape[0]), texts.pooled.dtype))
        return jax.lax.scan(one, (texts, empty), jnp.arange(n))[0][1]

    def forward(params, images, texts):
        return rows_of(params, images, texts), (params, images, texts)

    def backward(saved, gradient):
        params, images, texts = saved

        def one(carry, hop):
            texts, of_params, of_images, of_texts = carry
            moving, still = _floats(texts)
            floats, rest = _floats(images)
            _, back = jax.vjp(lambda p, v, t: block(p, _merge(v, rest), _merge(t, still)), params, floats, moving)
            size = (images.mask.shape[0], texts.mask.shape[0])
            p, v, t = back(jax.lax.dynamic_slice(gradient, (0, column(hop, texts)), size))
            of_params, of_images, of_texts = jax.tree.map(jnp.add, (of_params, of_images, of_texts), (p, v, t))
            return (send(texts), of_params, of_images, send(of_texts)), None

        zeros = jax.tree.map(jnp.zeros_like, (params, _floats(images)[0], _floats(texts)[0]))
        (_, of_params, of_images, of_texts), _ = jax.lax.scan(one, (texts, *zeros), jnp.arange(n))
        return of_params, of_images, of_texts

    ring = jax.custom_vjp(rows_of)
    ring.defvjp(forward, backward)
    return ring(vary(params), images, texts)


def _floats(tree):
    """Two trees: what has gradients, and the rest (masks, ids); None where the other has something."""
    real = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), tree)
    return (
        jax.tree.map(lambda x, yes: x if yes else None, tree, real),
        jax.tree.map(lambda x, yes: None if yes else x, tree, real),
    )


def _merge(floats, rest):
    return jax.tree.map(lambda a, b: b if a is None else a, floats, rest, is_leaf=lambda x: x is None)


def score_in_tiles(score, images: Features, texts: Features, score_tile_mib: float) -> jax.Array:
    """`score(images, texts)`, float32 `(I, T)`, with at most `score_tile_mib` MiB for an array of every region by every word
    of a tile (float32; one text at the least). A tile is a divisor of T; all texts at once where they fit."""
    tile = texts_per_tile(images.mask.size, texts.mask.shape, score_tile_mib)
    number = texts.mask.shape[0] // tile
    if number == 1:
        return score(images, texts)
    tiles = jax.tree.map(lambda x: x.reshape(number, tile, *x.shape[1:]), texts)
    scores = jax.lax.map(jax.checkpoint(lambda part: score(images, part)), tiles)  # (T / tile, I, tile)
    return jnp.moveaxis(scores, 0, 1).reshape(images.mask.shape[0], -1)


def texts_per_tile(regions: int, texts: tuple[int, int], score_tile_mib: float) -> int:
    """The largest divisor of T, for texts `(T, M)`, whose words times all images' `regions` fit into `score_tile_mib`."""
    number, words = texts
    fit = score_tile_mib * 2**20 / (4 * regions * words)
    return max(k for k in range(1, number + 1) if number % k == 0 and (k == 1 or k <= fit))
