"""Two-stage retrieval of a whole split: the nearest by the matcher's coarse vectors, then the matcher on these alone.

Captions that are near one another share a list of images, as many captions as fill a group of words (`packing.py`), so
that a group and its images are one tile of scores, as dense as in scoring all pairs; lists of their own would have few
images in common. In a list are the images that are nearest to any of its captions, by the rank that each caption gives
them. An image is ranked against the captions whose list it is in.
"""

import dataclasses
import functools

import jax
import numpy as np

from mefn_jax.data.pipeline import pad_rows
from mefn_jax.matching.features import Features
from mefn_jax.matching.packing import pack
from mefn_jax.matching.sides import packed, regions_of
from mefn_jax.matching.tiled import IMAGES, parts, tile_images
from mefn_jax.sharding import BATCH, by_rows, put_whole, replicated

TILES = 64  # scored by one call, on each device, at most
NEAR = 8  # captions, about as many as a group holds, among which order does not matter


@dataclasses.dataclass(frozen=True)
class Shortlists:
    """The candidates of every caption: `images` int64 `(C, k)`, and their `scores` float32."""

    images: np.ndarray
    scores: np.ndarray


def nearest(queries: np.ndarray, vectors: np.ndarray, k: int, mesh) -> np.ndarray:
    """The positions int64 `(Q, k)` of the k vectors `(V, D)` with the largest products with each of `queries (Q, D)`:
    exact, but for TPUs, which leave out a few for speed."""
    found, whole = [], put_whole(replicated(mesh), vectors)
    for rows in parts(len(queries), IMAGES):
        part = put_whole(by_rows(mesh), pad_rows(queries[rows], -(-(rows.stop - rows.start) // mesh.size) * mesh.size))
        found.append(np.asarray(_nearest(part, whole, k=k))[: rows.stop - rows.start])
    return np.concatenate(found).astype(np.int64)


@functools.partial(jax.jit, static_argnames="k")
def _nearest(queries, vectors, *, k: int):
    top = jax.lax.approx_max_k if jax.default_backend() == "tpu" else jax.lax.top_k
    return top(queries @ vectors.T, k)[1]


def compiled(tile, mesh):
    """Two compiled programs. `arrange(images, groups)` makes Regions and Packed of Features and of what `pack` gives;
    `step(params, regions, packed, group, images)`, float32 `(n, I, T)`, scores tiles of a group and some images: int32
    `(n,)` and `(n, I)`, split over the devices, where all else is whole. Returns `(step, arrange)`."""

    def on_device(params, regions, groups, group, images):
        def of_tile(at):
            group, images = at
            words = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, group, keepdims=False), groups)
            some = jax.tree.map(lambda x: x.at[images].get(mode="promise_in_bounds"), regions)
            return tile(params, some, words)

        return jax.lax.map(of_tile, (group, images))

    rows, everywhere = jax.sharding.PartitionSpec(BATCH), jax.sharding.PartitionSpec()
    specs = (everywhere, everywhere, everywhere, rows, rows)
    step = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=rows), out_shardings=replicated(mesh))
    arrange = jax.jit(lambda images, groups: (regions_of(images), packed(*groups)))
    return step, arrange


def score(programs, params, images: Features, texts: Features, lists, order, mesh, mib: float) -> Shortlists:
    """The scores of captions with k images each, of `lists (C, k)`, each caption's own with the nearest image first.
    `programs` are `compiled`'s; images and texts Features of NumPy arrays; `order (C,)` is the captions as they go into
    groups (`near_together`); `mib` as in `tiled.compiled`."""
    step, arrange = programs
    groups, number, place = pack(texts, order)
    group, slot = np.divmod(place, groups[1].shape[2])
    k = lists.shape[1]
    shared = share(lists, group)  # (G, k)
    tiles, size = tile_images(k, images.mask.shape[1], groups[1].shape[1], mib)
    of_tile = np.pad(shared, ((0, 0), (0, tiles * size - k)), mode="edge").reshape(-1, size).astype(np.int32)
    group_of_tile = np.repeat(np.arange(number, dtype=np.int32), tiles)
    regions, words = arrange(*put_whole(replicated(mesh), (images, groups)))
    scores, calls = [], -(-len(of_tile) // (TILES * mesh.size))
    most = -(-len(of_tile) // (calls * mesh.size)) * mesh.size  # so that the last call is hardly filled up
    for first in range(0, len(of_tile), most):
        now = tuple(pad_rows(x[first : first + most], most) for x in (group_of_tile, of_tile))
        scores.append(step(params, regions, words, *put_whole(by_rows(mesh), now)))
    scores = np.concatenate([np.asarray(x) for x in scores])[: len(of_tile)]
    scores = scores.reshape(number, tiles * size, -1)[:, :k]  # (G, k, T)
    return Shortlists(shared[group], scores[group, :, slot])


def share(lists: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The lists `(G, k)` of groups of captions, of the captions' own, `lists (C, k)`: the images that have the best
    rank in any of them, the smaller number first where ranks are equal. `group (C,)` has each of 0 to G - 1."""
    captions, k = lists.shape
    images = int(lists.max()) + 1
    # Each image of a group once, where it first is in a list: the lists are gone through rank by rank.
    cells, at = np.unique((group[:, None] * images + lists).ravel(order="F"), return_index=True)
    of, image = np.divmod(cells, images)
    order = np.lexsort((at // captions, of))
    start = np.searchsorted(of, np.arange(of[-1] + 1))
    return image[order][start[:, None] + np.arange(k)]


def near_together(vectors: np.ndarray) -> np.ndarray:
    """An order `(C,)` of vectors `(C, D)` in which neighbours are near: halves on both sides of the middle between two
    that are far apart, and so on in each half."""
    if len(vectors) <= NEAR:
        return np.arange(len(vectors))
    one = np.argmin(vectors @ vectors.mean(0))
    other = np.argmin(vectors @ vectors[one])
    along = np.argsort(vectors @ (vectors[one] - vectors[other]), kind="stable")
    halves = np.array_split(along, 2)
    return np.concatenate([half[near_together(vectors[half])] for half in halves])


def counts(found: Shortlists, caption_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The counts `(n_i2t, n_t2i)`, int64 `(C,)`, that metrics follow from, as of `ranking.rank`: within the lists; what
    is not listed stands behind all that are not relevant."""
    captions, images = len(caption_image), int(caption_image.max()) + 1
    own = found.images == caption_image[:, None]  # (C, k)
    mine = np.max(np.where(own, found.scores, -np.inf), 1)
    n_t2i = np.sum(~own & (found.scores >= mine[:, None]), 1)
    n_t2i = np.where(own.any(1), n_t2i, images - 1)

    n_i2t = captions - np.bincount(caption_image, minlength=images)[caption_image]
    # The scores of each image's candidates that are not its own, in rising order.
    image, score = found.images[~own], found.scores[~own]
    order = np.lexsort((score, image))
    bounds, score = np.searchsorted(image[order], np.arange(images + 1)), score[order]
    for caption in np.flatnonzero(own.any(1)):
        others = score[bounds[caption_image[caption]] : bounds[caption_image[caption] + 1]]
        n_i2t[caption] = len(others) - np.searchsorted(others, mine[caption])
    return n_i2t.astype(np.int64), n_t2i.astype(np.int64)
