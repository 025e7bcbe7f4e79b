"""Two-stage retrieval of a whole split: the nearest by the matcher's coarse vectors, then the matcher on these alone.

Captions that are near one another share a list of images, as many captions as fill a group of words (`packing.py`), so
that a group and its images are one tile of scores, as dense as in scoring all pairs; lists of their own would have few
images in common. In a list are the images that are nearest to any of its captions, where 1 is how near a caption's
nearest image is to it and 0 how near images are to it in the mean. An image is ranked against the captions whose list
it is in.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mefn_jax.features import EPS, Features
from mefn_jax.runtime.sharding import BATCH_AXES, batch_sharding, from_full_copy, replicated
from mefn_jax.scoring.layouts import pack_group, region_block
from mefn_jax.scoring.packing import gather_groups, plan_groups
from mefn_jax.scoring.tiles import even_slices, plan_tiles

TILES_PER_CALL = 64  # scored by one call, on each device, at most
GROUPS_AT_ONCE = 16  # whose lists are made at once
MIN_CLUSTER = 8  # captions, about as many as a group holds, among which order does not matter
REFINEMENTS = 2  # times that the middle is moved between the halves' means


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The candidates of every caption: `images` int32 `(C, k)`, and their `scores` float32."""

    images: np.ndarray
    scores: np.ndarray


def compile_reranker(tile, mesh):
    """Three compiled programs, `(step, arrange, lists)`.

    `arrange(images)` makes Regions of Features. `lists(of_texts, of_images, captions, k)`, int32 `(G, k)`, are the
    images for groups of captions `(G, T)`, by the coarse vectors of all: exact, but for TPUs, which leave out a few for
    speed. `step(params, regions, images, *groups)`, float32 `(n, tiles, I, T)`, scores groups of texts, as
    `packing.fill` gives them, with tiles of some images each, int32 `(n, tiles, I)`; before levels are taken from it.
    Groups are split over the devices; all else is whole.
    """

    def on_device(params, regions, images, *groups):
        def of_group(at):
            images, words = at[0], pack_group(*at[1])
            return jax.lax.map(lambda some: tile(params, _rows(regions, some), words), images)

        return jax.lax.map(of_group, (images, groups))

    rows, everywhere = jax.sharding.PartitionSpec(BATCH_AXES), jax.sharding.PartitionSpec()
    top = jax.lax.approx_max_k if mesh.devices.flat[0].platform == "tpu" else jax.lax.top_k

    def split(function, *specs):
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows)

    def lists(of_texts, of_images, captions, k):
        find = functools.partial(_find_candidates, k=k, top=top)
        return split(find, everywhere, everywhere, rows)(of_texts, of_images, captions)

    replied = {"out_shardings": replicated(mesh)}
    step = jax.jit(split(on_device, everywhere, everywhere, rows, rows, rows, rows), **replied)
    return step, jax.jit(region_block), jax.jit(lists, static_argnums=3, **replied)


def _rows(tree, at):
    return jax.tree.map(lambda x: x.at[at].get(mode="promise_in_bounds"), tree)


def _find_candidates(of_texts, of_images, captions, *, k: int, top):
    def of_group(captions):
        products = of_texts[captions] @ of_images.T  # (T, I)
        mean, best = jnp.mean(products, 1, keepdims=True), jnp.max(products, 1, keepdims=True)
        near = (products - mean) / jnp.maximum(best - mean, EPS)  # 1 for a caption's nearest
        near = jnp.max(jnp.where(captions[:, None] >= 0, near, -jnp.inf), 0)  # to any of them
        return top(near, k)[1]

    return jax.lax.map(of_group, captions, batch_size=GROUPS_AT_ONCE)


def score_candidates(
    programs, params, images: Features, texts: Features, of_images, of_texts, k: int, mesh, mib: float
):
    """The scores of captions with k images each, before levels are taken from them: Shortlists.

    `programs` are `compiled`'s; Features, and `of_images (I, D)` and `of_texts (C, D)`, their coarse vectors, are of
    NumPy arrays; `mib` as in `tiled.compiled`.
    """
    step, arrange, lists = programs
    images, *coarse = from_full_copy(replicated(mesh), (images, of_texts, of_images))
    regions = arrange(images)
    words, captions, place = plan_groups(texts.mask, similarity_order(of_texts))
    number, shape = len(words), plan_tiles(k, images.mask.shape[1], words.shape[1], mib)  # (tiles, I)
    calls = -(-number * shape[0] // (TILES_PER_CALL * mesh.size))
    most = -(-number // (calls * mesh.size)) * mesh.size  # so that the last call is hardly filled up
    words, captions = (np.pad(x, ((0, -number % most), (0, 0)), constant_values=-1) for x in (words, captions))
    found = np.asarray(lists(*coarse, from_full_copy(batch_sharding(mesh), captions), k))  # (G, k)
    tiles = np.pad(found, ((0, 0), (0, math.prod(shape) - k)), mode="edge").reshape(-1, *shape)
    scores = []
    for part in even_slices(len(words), most):
        groups = gather_groups(texts, words[part], captions[part])  # while the devices are at the last call's
        scores.append(step(params, regions, *from_full_copy(batch_sharding(mesh), (tiles[part], *groups))))
        scores[:-1] = map(np.asarray, scores[:-1])  # so that two calls' groups are in memory at most
    scores = np.concatenate(scores)  # (G, tiles, I, T)
    scores = scores.reshape(len(scores), -1, captions.shape[1])[:, :k]
    group, slot = np.divmod(place, captions.shape[1])
    return Candidates(found[group], scores[group, :, slot])


def similarity_order(vectors: np.ndarray) -> np.ndarray:
    """An order `(C,)` of vectors `(C, D)` in which neighbours are near: halves, at first on both sides of the middle
    between two that are far apart, then of the middle between the halves' means; and so on in each half."""
    if len(vectors) <= MIN_CLUSTER:
        return np.arange(len(vectors))
    one = np.argmin(vectors @ vectors.sum(0))
    other = np.argmin(vectors @ vectors[one])
    apart, middle = vectors[one] - vectors[other], len(vectors) // 2
    for _ in range(REFINEMENTS):
        along = vectors @ apart
        apart = np.sign(along - np.partition(along, middle)[middle]) @ vectors
    halves = np.array_split(np.argsort(vectors @ apart, kind="stable"), 2)
    return np.concatenate([half[similarity_order(vectors[half])] for half in halves])


def rank_counts(found: Candidates, caption_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The counts `(n_i2t, n_t2i)`, int64 `(C,)`, that metrics follow from, as of `ranking.rank`: within the lists; what
    is not listed stands behind all that are not relevant."""
    captions, images = len(caption_image), int(caption_image.max()) + 1
    own = found.images == caption_image[:, None]  # (C, k)
    mine = np.max(np.where(own, found.scores, -np.inf), 1)
    n_t2i = np.sum(~own & (found.scores >= mine[:, None]), 1)
    n_t2i = np.where(own.any(1), n_t2i, images - 1)

    n_i2t = captions - np.bincount(caption_image, minlength=images)[caption_image]
    # The candidates of all images that are not their own, image after image, in the order of their scores.
    others = np.sort(_sort_key(found.images[~own], found.scores[~own]))
    end = np.searchsorted(others, _sort_key(caption_image, np.float32(np.inf)), "right")
    n_i2t = np.where(own.any(1), end - np.searchsorted(others, _sort_key(caption_image, mine)), n_i2t)
    return n_i2t.astype(np.int64), n_t2i.astype(np.int64)


def _sort_key(image, score) -> np.ndarray:
    """Numbers int64 in the order of image first, then score float32: a float's bits are in its order but for the
    sign."""
    bits = (score + np.float32(0)).view(np.int32).astype(np.int64)  # -0 is 0
    return (image.astype(np.int64) << 33) + np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
