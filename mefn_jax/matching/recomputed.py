"""Scores of all pairs in training: a tile of texts at a time, computed again in the backward pass.

What is kept is the scores; the blocks of regions by words of one tile exist at a time, small enough for a processor's
cache.
"""

import jax
import jax.numpy as jnp

from mefn_jax.matching.features import Features


def recomputed(score, images: Features, texts: Features, tile_mib: float) -> jax.Array:
    """`score(images, texts)`, float32 `(I, T)`, with at most `tile_mib` MiB for an array of every region by every word
    of a tile (float32; one text at the least). A tile is a divisor of T; all texts at once where they fit."""
    tile = tile_texts(images.mask.size, texts.mask.shape, tile_mib)
    number = texts.mask.shape[0] // tile
    if number == 1:
        return score(images, texts)
    tiles = jax.tree.map(lambda x: x.reshape(number, tile, *x.shape[1:]), texts)
    scores = jax.lax.map(jax.checkpoint(lambda part: score(images, part)), tiles)  # (T / tile, I, tile)
    return jnp.moveaxis(scores, 0, 1).reshape(images.mask.shape[0], -1)


def tile_texts(regions: int, texts: tuple[int, int], tile_mib: float) -> int:
    """The largest divisor of T, for texts `(T, M)`, whose words times all images' `regions` fit into `tile_mib`."""
    number, words = texts
    fit = tile_mib * 2**20 / (4 * regions * words)
    return max(k for k in range(1, number + 1) if number % k == 0 and (k == 1 or k <= fit))
