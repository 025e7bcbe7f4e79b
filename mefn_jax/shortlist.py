"""Two-stage retrieval of a whole split: the nearest by the matcher's coarse vectors, then the matcher on these alone.

One list serves both sides: the k images nearest to each caption. An image is ranked against the captions that list it.
Pairs are wanted one by one, but scored a few at a time: captions stand in an order in which neighbours have much the
same lists, and those whose words fill a group go together; a task is a group and some of the images that any of its
captions wants.
"""

import dataclasses
import functools

import jax
import numpy as np

from mefn_jax.data.pipeline import pad_rows
from mefn_jax.matching.features import Features
from mefn_jax.matching.packing import pack
from mefn_jax.matching.sides import packed, regions_of
from mefn_jax.matching.tiled import IMAGES, parts
from mefn_jax.sharding import BATCH, by_rows, put_whole, replicated

TASK = 64  # images of a task
TASKS = 256  # scored by one call, on each device


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
    `step(params, regions, packed, task_group, task_images)`, float32 `(n, TASK, T)`, scores tasks: int32 `(n,)` and
    `(n, TASK)`, split over the devices, where all else is whole. Returns `(step, arrange)`."""

    def on_device(params, regions, groups, task_group, task_images):
        def of_task(task):
            group, images = task
            words = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, group, keepdims=False), groups)
            return tile(params, jax.tree.map(lambda x: x[images], regions), words)

        return jax.lax.map(of_task, (task_group, task_images))

    rows, everywhere = jax.sharding.PartitionSpec(BATCH), jax.sharding.PartitionSpec()
    specs = (everywhere, everywhere, everywhere, rows, rows)
    step = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=rows), out_shardings=replicated(mesh))
    arrange = jax.jit(lambda images, groups: (regions_of(images), packed(*groups)))
    return step, arrange


def score(programs, params, images: Features, texts: Features, lists, order, mesh) -> Shortlists:
    """Scores `lists (C, k)`, the images of each caption. `programs` are `compiled`'s; images and texts Features of
    NumPy arrays; `order (C,)` is the captions as they go into groups (`near_together`)."""
    step, arrange = programs
    number = len(images.mask)
    groups, _, place = pack(jax.tree.map(lambda x: x[order], texts), in_order=True)
    place = place[np.argsort(order)]  # of the captions as they are given
    texts_of_group = groups[1].shape[2]
    # Each wanted (group, image) once, sorted by group.
    wanted = (place // texts_of_group)[:, None] * number + lists
    cells = np.unique(wanted)
    task, row, task_group, task_images = tasks(cells // number, cells % number)
    regions, words = arrange(*put_whole(replicated(mesh), (images, groups)))
    scores = []
    for first in range(0, len(task_group), TASKS * mesh.size):
        some = slice(first, first + TASKS * mesh.size)
        now = (pad_rows(x[some], TASKS * mesh.size) for x in (task_group, task_images))
        scores.append(step(params, regions, words, *put_whole(by_rows(mesh), tuple(now))))
    scores = np.concatenate([np.asarray(x) for x in scores])
    at = np.searchsorted(cells, wanted)
    return Shortlists(lists, scores[task[at], row[at], (place % texts_of_group)[:, None]])


def near_together(vectors: np.ndarray) -> np.ndarray:
    """An order `(C,)` of vectors `(C, D)` in which neighbours are near: halves on both sides of the middle between two
    that are far apart, and so on in each half."""
    if len(vectors) <= 2:
        return np.arange(len(vectors))
    one = np.argmin(vectors @ vectors.mean(0))
    other = np.argmin(vectors @ vectors[one])
    along = np.argsort(vectors @ (vectors[one] - vectors[other]), kind="stable")
    halves = np.array_split(along, 2)
    return np.concatenate([half[near_together(vectors[half])] for half in halves])


def tasks(groups: np.ndarray, images: np.ndarray):
    """Cells, sorted by group, in tasks of one group and TASK images: each cell's task and row, and each task's group
    `(n,)` and images `(n, TASK)`, int32, filled up with image 0."""
    first = np.r_[True, groups[1:] != groups[:-1]]
    start = np.flatnonzero(first)
    within = np.arange(len(groups)) - start[np.cumsum(first) - 1]
    task = np.cumsum(first | (within % TASK == 0)) - 1
    row = within % TASK
    task_images = np.zeros((task[-1] + 1, TASK), np.int32)
    task_images[task, row] = images
    return task, row, groups[row == 0].astype(np.int32), task_images


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
