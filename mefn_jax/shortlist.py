"""Two-stage retrieval of a whole split: the nearest by the matcher's coarse vectors, then the matcher on these alone.

Pairs are wanted one by one, but scored a few at a time: texts are packed in their order, so that the captions of an
image, whose shortlists are alike, share a group; a task is a group and some of the images that any of its texts wants.
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
    """The candidates of every query and their scores: `images` int64 `(C, k)` of each caption, `captions` `(I, K)` of
    each image; `image_scores`, `caption_scores` float32."""

    images: np.ndarray
    captions: np.ndarray
    image_scores: np.ndarray
    caption_scores: np.ndarray


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


def score(programs, params, images: Features, texts: Features, of_texts, of_images, mesh) -> Shortlists:
    """Scores the shortlists `of_texts (C, k)`, images of each caption, and `of_images (I, K)`, captions of each image.
    `programs` are `compiled`'s; images and texts Features of NumPy arrays."""
    step, arrange = programs
    number = len(images.mask)
    groups, _, place = pack(texts, in_order=True)
    texts_of_group = groups[1].shape[2]
    group = place // texts_of_group
    # Each wanted (group, image) once, sorted by group.
    by_text = group[:, None] * number + of_texts
    by_image = group[of_images] * number + np.arange(number)[:, None]
    cells = np.unique(np.concatenate([by_text.ravel(), by_image.ravel()]))
    task, row, task_group, task_images = tasks(cells // number, cells % number)
    regions, words = arrange(*put_whole(replicated(mesh), (images, groups)))
    scores = []
    for first in range(0, len(task_group), TASKS * mesh.size):
        some = slice(first, first + TASKS * mesh.size)
        now = (pad_rows(x[some], TASKS * mesh.size) for x in (task_group, task_images))
        scores.append(step(params, regions, words, *put_whole(by_rows(mesh), tuple(now))))
    scores = np.concatenate([np.asarray(x) for x in scores])

    def looked_up(wanted, captions):
        at = np.searchsorted(cells, wanted)
        return scores[task[at], row[at], (place % texts_of_group)[captions]]

    own = np.broadcast_to(np.arange(len(place))[:, None], of_texts.shape)
    return Shortlists(of_texts, of_images, looked_up(by_text, own), looked_up(by_image, of_images))


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
    """The counts `(n_i2t, n_t2i)`, int64 `(C,)`, that metrics follow from, as of `ranking.rank`: within the shortlists;
    what is not in one stands behind all that are not relevant."""
    images, captions = len(found.captions), len(caption_image)
    own = found.images == caption_image[:, None]  # (C, k)
    mine = np.max(np.where(own, found.image_scores, -np.inf), 1)
    n_t2i = np.sum(~own & (found.image_scores >= mine[:, None]), 1)
    n_t2i = np.where(own.any(1), n_t2i, images - 1)

    relevant = caption_image[found.captions] == np.arange(images)[:, None]  # (I, K)
    n_i2t = captions - np.bincount(caption_image, minlength=images)[caption_image]
    image, at = np.nonzero(relevant)
    others = np.where(relevant, -np.inf, found.caption_scores)[image]
    n_i2t[found.captions[image, at]] = np.sum(others >= found.caption_scores[image, at, None], 1)
    return n_i2t.astype(np.int64), n_t2i.astype(np.int64)
