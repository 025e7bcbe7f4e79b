"""Scores of all pairs of encoded images and texts, a tile at a time, for evaluation and retrieval.

Texts are packed (`packing.py`), so that no padding is scored. Images are split over the devices, and each device scores
a few of them at a time against one group of texts, so that the arrays of regions by words fit into a processor's cache
(docs/method.md, Eq. 50). Matchers without `score_tile` get Features as they are, or with `score_pairs`, items that are
prepared once (`compile_pair_scorer`).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mefn_jax.features import Features
from mefn_jax.runtime.flops import count_flops
from mefn_jax.runtime.sharding import BATCH_AXES, batch_sharding, from_full_copy, replicated, round_up
from mefn_jax.scoring.layouts import (
    PackedTexts,
    RegionBlock,
    no_projection,
    region_block,
    remove_vectors,
    to_packed,
)
from mefn_jax.scoring.packing import pack

# scores(rows, columns) -> float array (len(rows), len(columns)), for half-open ranges of images and of captions.
Scores = Callable[[slice, slice], np.ndarray]
TILE_IMAGES, TILE_CAPTIONS = 256, 1024  # images and captions per request that keep the devices busy
# Images and captions scored at once by a matcher with neither `score_tile` nor `score_pairs`: few, as the sizes of its
# arrays are unknown.
UNTILED_BLOCK = 32, 256
PAIRS_BLOCK = TILE_IMAGES, TILE_CAPTIONS  # those of a matcher with `score_pairs`, of which a few are scored at a time
NO_PROJECTIONS = no_projection, no_projection  # of images' and of texts' fragments


def even_slices(total: int, max_size: int) -> list[slice]:
    """Cuts `range(total)` into slices of one size, at most `max_size`; the last may be smaller."""
    size = -(-total // -(-total // max_size))
    return [slice(k, min(k + size, total)) for k in range(0, total, size)]


def plan_tiles(images: int, regions: int, words: int, mib: float) -> tuple[int, int]:
    """Returns the number of tiles for the images of one device, and the images in each, so that a float32 array of a
    tile's regions by the words of a group takes at most `mib` MiB, but for at least one image (docs/method.md,
    Eq. 50)."""
    max_images = max(1, int(mib * 2**20 / (4 * regions * words)))
    num_tiles = -(-images // max_images)
    return num_tiles, -(-images // num_tiles)


def compile_tile_scorer(score_tile, with_pooled: bool, mesh, mib: float, project=NO_PROJECTIONS):
    """Returns the compiled program `scorer(params, images, groups, num_groups)`, float32 `(I, K, T)`.

    `score_tile(params, products, regions, words)` scores one tile, before the hubness offsets are subtracted
    (`Matcher.score_tile`); `with_pooled` is the matcher's `uses_pooled_products`, and `project` are its
    `project_regions` and `project_words`, functions `(params, vectors)`. `images` are Features, as many as a multiple
    of the devices; `groups` and `num_groups`, those of K that are scored, are results of `pack`. `mib` is the limit of
    `plan_tiles`.
    """

    def score_on_device(params, images, groups, num_groups):
        vectors, membership, captions, pooled = groups
        project_regions, project_words = (functools.partial(p, params) for p in project)
        groups = to_packed(vectors, membership, pooled[captions], project_words)
        tiles, size = plan_tiles(*images.mask.shape, groups.membership.shape[1], mib)
        padding = tiles * size - len(images.mask)
        images = jax.tree.map(lambda x: jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)), images)

        def score_images(images):
            regions = region_block(images, project_regions)
            regions_pooled = _multiply_pooled(regions, pooled) if with_pooled else None

            def put_scores(k, scores):
                group = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), (groups, captions))
                tile = _score_group(score_tile, params, regions, regions_pooled, *group)
                return jax.lax.dynamic_update_index_in_dim(scores, tile, k, 0)

            empty = jnp.zeros((*captions.shape[:1], size, captions.shape[1]), jnp.float32)
            varying = jax.lax.pcast(empty, BATCH_AXES, to="varying")
            return jax.lax.fori_loop(0, num_groups, put_scores, varying)  # (K, I, T)

        images_by_tile = jax.tree.map(lambda x: x.reshape(tiles, size, *x.shape[1:]), images)
        scores = jnp.swapaxes(jax.lax.map(score_images, images_by_tile), 1, 2)  # (tiles, I, K, T)
        return scores.reshape(tiles * size, *scores.shape[2:])[: tiles * size - padding]

    rows, replicas = jax.sharding.PartitionSpec(BATCH_AXES), jax.sharding.PartitionSpec()
    specs = (replicas, rows, replicas, replicas)
    scorer = jax.shard_map(score_on_device, mesh=mesh, in_specs=specs, out_specs=rows)
    return jax.jit(scorer, in_shardings=(None, batch_sharding(mesh), None, None), out_shardings=replicated(mesh))


def compile_pair_scorer(prepare, score_pairs, floats_per_pair, mesh, mib: float):
    """Returns the compiled program `scorer(params, images, texts)`, float32 `(I, T)`, of Features of a multiple of the
    devices of images and of any number of texts, before the hubness offsets are subtracted.

    `prepare` are the matcher's `prepare_images` and `prepare_texts`, functions `(params, features)`;
    `score_pairs(params, images, texts)` scores what these return, and `floats_per_pair` is the matcher's. A device
    scores as many pairs at a time as take `mib` MiB, but at least one.
    """

    def score_on_device(params, images, texts):
        max_pairs = count_pairs_at_once(floats_per_pair(images, texts), mib)
        prepared = [function(params, x) for function, x in zip(prepare, (images, texts), strict=True)]
        return map_pairs(functools.partial(score_pairs, params), *prepared, max_pairs)

    rows, replicas = jax.sharding.PartitionSpec(BATCH_AXES), jax.sharding.PartitionSpec()
    scorer = jax.shard_map(score_on_device, mesh=mesh, in_specs=(replicas, rows, replicas), out_specs=rows)
    everywhere = replicated(mesh)
    return jax.jit(scorer, in_shardings=(None, batch_sharding(mesh), everywhere), out_shardings=everywhere)


def count_pairs_at_once(floats_per_pair: int, mib: float) -> int:
    """Returns how many pairs take at most `mib` MiB at once, but at least one (docs/method.md, Eq. 50)."""
    return max(1, int(mib * 2**20 / (4 * floats_per_pair)))


def map_pairs(score_pairs, images, texts, max_pairs: int) -> jax.Array:
    """Computes `score_pairs` of all pairs of I prepared images with T prepared texts, `(I, T)`, for at most `max_pairs`
    pairs at a time."""
    num_images, num_texts = (len(jax.tree.leaves(x)[0]) for x in (images, texts))
    columns = min(num_texts, max_pairs)
    rows = min(num_images, max(1, max_pairs // columns))
    text_tiles = _cut_padded(texts, columns)

    def score_images(images):
        images = jax.tree.map(lambda x: x[:, None], images)
        return jax.lax.map(lambda texts: score_pairs(images, texts), text_tiles)  # (K, rows, columns)

    scores = jnp.moveaxis(jax.lax.map(score_images, _cut_padded(images, rows)), 1, 2)  # (J, rows, K, columns)
    return scores.reshape(scores.shape[0] * rows, -1)[:num_images, :num_texts]


def _cut_padded(tree, size: int):
    """Returns arrays `(n, ...)` as `(K, size, ...)`, with zeros after the last row."""
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:]), tree
    )


def _multiply_pooled(regions: RegionBlock, pooled):
    """Returns the inner products of regions with the pooled embeddings `(C, D)` of captions, `(C, I, N)`. One product
    with all captions is faster than one for each group."""
    return jnp.einsum("cd,ind->cin", pooled, regions.vectors)


def _score_group(score_tile, params, regions: RegionBlock, regions_pooled, words: PackedTexts, captions):
    """Returns the scores `(I, T)` of a tile of images with one group of packed texts.

    `regions_pooled (C, I, N)` is the result of `_multiply_pooled`, None if the matcher does not use these products;
    `captions (T,)` says which of its C captions stand in the group's slots.
    """
    # An empty slot, -1, takes the last caption's products; nobody reads its scores.
    group_pooled = None if regions_pooled is None else jnp.moveaxis(regions_pooled[captions], 0, -1)  # (I, N, T)
    products = words.multiply_words(regions, group_pooled)
    return score_tile(params, products, remove_vectors(regions), remove_vectors(words))


def count_tile_flops(score_tile, with_pooled: bool, params, images: Features, groups, project=NO_PROJECTIONS) -> float:
    """Returns the FLOPs of scoring a tile of images against `groups` of `pack`, without those of their own layout; all
    may be shapes. The other arguments are those of `compile_tile_scorer`."""

    def arrange_regions(params, images):
        return region_block(images, functools.partial(project[0], params))

    def take_first_group(params, vectors, membership, captions, pooled):
        words = to_packed(vectors, membership, pooled[captions], functools.partial(project[1], params))
        return jax.tree.map(lambda x: x[0], (words, captions))

    regions = jax.eval_shape(arrange_regions, params, images)

    group, pooled = jax.eval_shape(take_first_group, params, *groups), groups[-1]
    regions_pooled, pooled_flops = None, 0.0
    if with_pooled:
        regions_pooled = jax.eval_shape(_multiply_pooled, regions, pooled)
        pooled_flops = count_flops(_multiply_pooled, regions, pooled)
    score_group = functools.partial(_score_group, score_tile)
    return pooled_flops + len(groups[0]) * count_flops(score_group, params, regions, regions_pooled, *group)


class TiledScores:
    """Scores of encoded images against encoded texts (Features of NumPy arrays), a tile at a time:
    `scores(rows, columns)`.

    `scorer` is a program of `compile_tile_scorer` with its parameters bound; `hub_offsets`, float32 `(I,)` of images
    and `(C,)` of texts, are subtracted from its result. With a `block`, for a matcher without `score_tile`,
    `scorer(images, texts)` scores Features of at most so many images, on each device, and texts. All tiles have one
    shape, so nothing is compiled twice.
    """

    def __init__(self, scorer, images: Features, texts: Features, mesh, block: tuple | None = None, hub_offsets=None):
        self._scorer, self._images, self._texts, self._mesh, self._untiled = scorer, images, texts, mesh, bool(block)
        self._hub_offsets = hub_offsets
        max_rows, max_columns = block or (TILE_IMAGES, TILE_CAPTIONS)
        rows = even_slices(len(images.mask), max_rows * mesh.size)[0]
        self._rows, self._columns = round_up(rows.stop, mesh.size), min(max_columns, len(texts.mask))
        self._groups, self._tile = {}, (None, None)

    def __call__(self, rows: slice, columns: slice) -> np.ndarray:
        """Returns the scores of a range of images and a range of texts, float32 `(len(rows), len(columns))`."""
        scores = np.concatenate(
            [
                self._score_rows(slice(k, min(k + self._rows, rows.stop)), columns)
                for k in range(rows.start, rows.stop, self._rows)
            ]
        )
        if self._hub_offsets is None:
            return scores
        image_offsets, text_offsets = self._hub_offsets
        return scores - image_offsets[rows, None] - text_offsets[columns]

    def _score_rows(self, rows: slice, columns: slice) -> np.ndarray:
        if rows != self._tile[0]:  # requests come row by row: the images of a row are put on the devices once
            tile = jax.tree.map(lambda x: slice_padded(x, rows, self._rows), self._images)
            self._tile = rows, from_full_copy(batch_sharding(self._mesh), tile)
        score = self._score_texts if self._untiled else self._score_groups
        return score(self._tile[1], columns)[: rows.stop - rows.start]

    def _score_groups(self, images: Features, columns: slice) -> np.ndarray:
        groups, num_groups, slot = self._pack_texts(columns.start, columns.stop)
        scores = np.asarray(self._scorer(images, groups, num_groups))  # (I, K, T)
        return scores.reshape(len(scores), -1)[:, slot]

    def _pack_texts(self, start: int, stop: int):
        """Returns the groups of texts `start : stop` on the devices, their number, and the texts' slots; packs once."""
        if (start, stop) not in self._groups:
            groups, number, slot = pack(jax.tree.map(lambda x: x[start:stop], self._texts))
            full = replicated(self._mesh)
            self._groups[start, stop] = from_full_copy(full, groups), from_full_copy(full, np.int32(number)), slot
        return self._groups[start, stop]

    def _score_texts(self, images: Features, columns: slice) -> np.ndarray:
        scores = []
        for start in range(columns.start, columns.stop, self._columns):
            block = slice(start, min(start + self._columns, columns.stop))
            texts = jax.tree.map(lambda x, block=block: slice_padded(x, block, self._columns), self._texts)
            scores.append(
                np.asarray(self._scorer(images, from_full_copy(replicated(self._mesh), texts)))[:, : block.stop - start]
            )
        return np.concatenate(scores, 1)


def slice_padded(x: np.ndarray, rows: slice, size: int) -> np.ndarray:
    """Returns `x[rows]`, followed by rows of zeros up to `size` rows."""
    x = x[rows]
    return x if len(x) == size else np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])
