"""Reranking of a whole split: candidates by embedding, then the matcher on these alone (docs/method.md, section 13).

Each caption's own candidates would overlap little and be slow to score, so captions with similar embeddings form a
group (`packing.py`) with one list of candidates, and a group x list is a dense tile, as in scoring all pairs. The
candidates of a group are the images nearest to any of its captions, nearness being 1 at a caption's nearest image and 0
at its mean over the images (Eqs. 64 and 65). An image is ranked only against captions whose list contains it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mefn_jax.features import EPS, Features
from mefn_jax.runtime.sharding import BATCH_AXES, batch_sharding, from_full_copy, replicated
from mefn_jax.scoring.layouts import pack_group, region_block, separate_vectors
from mefn_jax.scoring.packing import gather_groups, plan_groups
from mefn_jax.scoring.tiles import NO_PROJECTIONS, even_slices, plan_tiles

TILES_PER_CALL = 64  # largest number of tiles that one call scores on each device
GROUPS_AT_ONCE = 16  # groups whose candidates are found at once
MIN_CLUSTER = 8  # captions that are not ordered further: about as many as a group holds
REFINEMENTS = 2  # times that the direction between two halves is refined


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Candidates of every caption: `images` int32 `(C, k)`, and their `scores` float32 `(C, k)`."""

    images: np.ndarray
    scores: np.ndarray


def compile_reranker(score_tile, with_pooled: bool, mesh, project=NO_PROJECTIONS):
    """Returns three compiled programs, `(score_groups, arrange_regions, find_candidates)`.

    `arrange_regions(params, images)` makes a RegionBlock of Features. `find_candidates(text_vectors, image_vectors,
    captions, k)`, int32 `(G, k)`, returns the candidates for groups of captions `(G, T)` from the embeddings of all:
    exactly, but on TPUs approximately, which leaves out a few and is faster. `score_groups(params, regions, images,
    *groups)`, float32 `(G, tiles, I, T)`, scores groups of texts, as `packing.gather_groups` returns them, with tiles
    of images, int32 `(G, tiles, I)`, before the hubness offsets are subtracted; `score_tile`, `with_pooled` and
    `project` are those of `tiles.compile_tile_scorer`. Groups are split over the devices; every device has all the
    rest.
    """

    project_regions, project_words = project

    def arrange_regions(params, images):
        return region_block(images, functools.partial(project_regions, params))

    def score_on_device(params, regions, images, *groups):
        def score_group(group):
            images, words = group[0], pack_group(*group[1], functools.partial(project_words, params))

            def score_images(rows):
                return score_tile(params, *separate_vectors(take_rows(regions, rows), words, with_pooled))

            return jax.lax.map(score_images, images)

        return jax.lax.map(score_group, (images, groups))

    rows, replicas = jax.sharding.PartitionSpec(BATCH_AXES), jax.sharding.PartitionSpec()
    top_k = jax.lax.approx_max_k if mesh.devices.flat[0].platform == "tpu" else jax.lax.top_k

    def split_groups(function, *specs):
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows)

    def find_candidates(text_vectors, image_vectors, captions, k):
        find = functools.partial(_find_candidates, k=k, top_k=top_k)
        return split_groups(find, replicas, replicas, rows)(text_vectors, image_vectors, captions)

    to_all = {"out_shardings": replicated(mesh)}
    score_groups = jax.jit(split_groups(score_on_device, replicas, replicas, rows, rows, rows, rows), **to_all)
    return score_groups, jax.jit(arrange_regions), jax.jit(find_candidates, static_argnums=3, **to_all)


def take_rows(tree, rows):
    """Returns rows of arrays, of which all exist."""
    return jax.tree.map(lambda x: x.at[rows].get(mode="promise_in_bounds"), tree)


def _find_candidates(text_vectors, image_vectors, captions, *, k: int, top_k):
    """Finds the candidates `(G, k)` of groups of captions `(G, T)`, which are -1 in empty slots (docs/method.md,
    Eqs. 64 and 65)."""

    def find_in_group(captions):
        products = text_vectors[captions] @ image_vectors.T  # (T, I)
        mean, largest = jnp.mean(products, 1, keepdims=True), jnp.max(products, 1, keepdims=True)
        near = (products - mean) / jnp.maximum(largest - mean, EPS)  # 1 at a caption's nearest image
        near = jnp.max(jnp.where(captions[:, None] >= 0, near, -jnp.inf), 0)  # to any caption of the group
        return top_k(near, k)[1]

    return jax.lax.map(find_in_group, captions, batch_size=GROUPS_AT_ONCE)


def score_candidates(
    programs, params, images: Features, texts: Features, image_vectors, text_vectors, k: int, mesh, mib: float
):
    """Scores captions with k images each and returns their Candidates, before the hubness offsets are subtracted.

    `programs` is the result of `compile_reranker`. Features and their embeddings, `image_vectors (I, D)` and
    `text_vectors (C, D)`, hold NumPy arrays; `mib` is the limit of `tiles.plan_tiles`.
    """
    score_groups, arrange_regions, find_candidates = programs
    images, *vectors = from_full_copy(replicated(mesh), (images, text_vectors, image_vectors))
    regions = arrange_regions(params, images)
    words, captions, flat_slot = plan_groups(texts.mask, similarity_order(text_vectors))
    num_groups, shape = len(words), plan_tiles(k, images.mask.shape[1], words.shape[1], mib)  # (tiles, I)
    calls = -(-num_groups * shape[0] // (TILES_PER_CALL * mesh.size))
    groups_per_call = -(-num_groups // (calls * mesh.size)) * mesh.size  # so that the last call has little padding
    words, captions = (
        np.pad(x, ((0, -num_groups % groups_per_call), (0, 0)), constant_values=-1) for x in (words, captions)
    )
    candidates = np.asarray(find_candidates(*vectors, from_full_copy(batch_sharding(mesh), captions), k))  # (G, k)
    tiles = np.pad(candidates, ((0, 0), (0, math.prod(shape) - k)), mode="edge").reshape(-1, *shape)
    scores = []
    for part in even_slices(len(words), groups_per_call):
        groups = gather_groups(texts, words[part], captions[part])  # while the devices compute the previous call
        scores.append(score_groups(params, regions, *from_full_copy(batch_sharding(mesh), (tiles[part], *groups))))
        scores[:-1] = map(np.asarray, scores[:-1])  # so that the groups of at most two calls are in memory
    scores = np.concatenate(scores)  # (G, tiles, I, T)
    scores = scores.reshape(len(scores), -1, captions.shape[1])[:, :k]
    group, slot = np.divmod(flat_slot, captions.shape[1])
    return Candidates(candidates[group], scores[group, :, slot])


def similarity_order(vectors: np.ndarray) -> np.ndarray:
    """Returns an order `(C,)` of vectors `(C, D)` in which neighbors are similar: cuts them into two halves along a
    direction and recurses. The direction starts between two vectors that are far apart and is refined REFINEMENTS times
    to the difference of the halves' sums."""
    if len(vectors) <= MIN_CLUSTER:
        return np.arange(len(vectors))
    one = np.argmin(vectors @ vectors.sum(0))
    other = np.argmin(vectors @ vectors[one])
    direction, middle = vectors[one] - vectors[other], len(vectors) // 2
    for _ in range(REFINEMENTS):
        along = vectors @ direction
        direction = np.sign(along - np.partition(along, middle)[middle]) @ vectors
    halves = np.array_split(np.argsort(vectors @ direction, kind="stable"), 2)
    return np.concatenate([half[similarity_order(vectors[half])] for half in halves])


def rank_counts(candidates: Candidates, caption_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the counts `(n_i2t, n_t2i)`, int64 `(C,)` each, from which metrics follow, within the lists of candidates
    (docs/method.md, Eqs. 56 and 57). A caption whose image is not in its list ranks behind all negatives, in both
    directions."""
    captions, images = len(caption_image), int(caption_image.max()) + 1
    positive = candidates.images == caption_image[:, None]  # (C, k)
    positive_scores = np.max(np.where(positive, candidates.scores, -np.inf), 1)
    n_t2i = np.sum(~positive & (candidates.scores >= positive_scores[:, None]), 1)
    n_t2i = np.where(positive.any(1), n_t2i, images - 1)

    n_i2t = captions - np.bincount(caption_image, minlength=images)[caption_image]
    # All negatives in the lists, sorted by image and then by score.
    negatives = np.sort(pack_sort_key(candidates.images[~positive], candidates.scores[~positive]))
    end = np.searchsorted(negatives, pack_sort_key(caption_image, np.float32(np.inf)), "right")
    n_i2t = np.where(
        positive.any(1), end - np.searchsorted(negatives, pack_sort_key(caption_image, positive_scores)), n_i2t
    )
    return n_i2t.astype(np.int64), n_t2i.astype(np.int64)


def pack_sort_key(image, score) -> np.ndarray:
    """Packs image and float32 score into one int64 that sorts by image, then by score. (IEEE float bits sort like the
    numbers, apart from the sign.)"""
    bits = (score + np.float32(0)).view(np.int32).astype(np.int64)  # -0 becomes 0
    return (image.astype(np.int64) << 33) + np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
