"""Scores of all pairs of encoded images and texts, a tile at a time: what evaluation and retrieval use.

Texts are packed (`packing.py`) so that no padding is scored; images are split over the devices, and each device scores
a few of them at a time against a group of texts, so that the arrays of regions by words stay small enough for a
processor's cache. Matchers without `tile` get Features as they are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mefn_jax.features import Features
from mefn_jax.runtime.sharding import BATCH_AXES, batch_sharding, from_full_copy, replicated, round_up
from mefn_jax.scoring.layouts import region_block, to_packed
from mefn_jax.scoring.packing import pack

# scores(images, captions) -> float array (len(images), len(captions)), for half-open ranges of positions.
Scores = Callable[[slice, slice], np.ndarray]
TILE_IMAGES, TILE_CAPTIONS = 256, 1024  # that are best asked for at once
UNTILED_BLOCK = 32, 256  # images and captions at once for a matcher without `tile`, of whose arrays nothing is known


def even_slices(total: int, most: int) -> list[slice]:
    """`range(total)` in parts of one size, at most `most`; the last may be smaller."""
    size = -(-total // -(-total // most))
    return [slice(k, min(k + size, total)) for k in range(0, total, size)]


def plan_tiles(images: int, regions: int, words: int, mib: float) -> tuple[int, int]:
    """For the images of a device: how many tiles of how many each, so that a float32 array of their regions by the
    words of a group takes at most `mib` MiB (one image at the least)."""
    fit = max(1, int(mib * 2**20 / (4 * regions * words)))
    number = -(-images // fit)
    return number, -(-images // number)


def compile_tile_scorer(tile, mesh, mib: float):
    """The compiled step of scoring: `step(params, images, groups, number)`, float32 `(I, K, T)`.

    `tile(params, regions, words)` scores one tile, before levels are taken from it. `images` are Features, a multiple
    of the devices; `groups` and `number`, of those that are scored, what `pack` gives.
    """

    def on_device(params, images, groups, number):
        groups = to_packed(*groups)
        tiles, size = plan_tiles(*images.mask.shape, groups.membership.shape[1], mib)
        fill = tiles * size - len(images.mask)
        images = jax.tree.map(lambda x: jnp.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1)), images)

        def of_tile(images):
            regions = region_block(images)

            def of_group(k, scores):
                words = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), groups)
                return jax.lax.dynamic_update_index_in_dim(scores, tile(params, regions, words), k, 0)

            empty = jnp.zeros((len(groups.membership), size, groups.membership.shape[2]), jnp.float32)
            varying = jax.lax.pcast(empty, BATCH_AXES, to="varying")
            return jax.lax.fori_loop(0, number, of_group, varying)  # (K, I, T)

        by_tile = jax.tree.map(lambda x: x.reshape(tiles, size, *x.shape[1:]), images)
        scores = jnp.swapaxes(jax.lax.map(of_tile, by_tile), 1, 2)  # (tiles, I, K, T)
        return scores.reshape(tiles * size, *scores.shape[2:])[: tiles * size - fill]

    rows, everywhere = jax.sharding.PartitionSpec(BATCH_AXES), jax.sharding.PartitionSpec()
    specs = (everywhere, rows, everywhere, everywhere)
    split = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=rows)
    return jax.jit(split, in_shardings=(None, batch_sharding(mesh), None, None), out_shardings=replicated(mesh))


class TiledScores:
    """`Scores` of encoded images and texts, Features of NumPy arrays.

    `step` is a program of `compiled`, with its parameters, and `levels`, float32 `(I,)` and `(C,)`, are what is taken
    from its scores of each image and each text; or, if `plain`, `step(images, texts)` scores Features. All tiles have
    one shape, so that nothing is compiled twice.
    """

    def __init__(self, step, images: Features, texts: Features, mesh, plain: bool = False, hub_offsets=None):
        self._step, self._images, self._texts, self._mesh, self._plain = step, images, texts, mesh, plain
        self._hub_offsets = hub_offsets
        most = UNTILED_BLOCK[0] if plain else TILE_IMAGES
        rows = even_slices(len(images.mask), most * mesh.size)[0]
        self._rows = round_up(rows.stop, mesh.size)
        self._groups, self._tile = {}, (None, None)

    def __call__(self, rows: slice, columns: slice) -> np.ndarray:
        scores = np.concatenate(
            [
                self._of_rows(slice(k, min(k + self._rows, rows.stop)), columns)
                for k in range(rows.start, rows.stop, self._rows)
            ]
        )
        if self._hub_offsets is None:
            return scores
        of_images, of_texts = self._hub_offsets
        return scores - of_images[rows, None] - of_texts[columns]

    def _of_rows(self, rows: slice, columns: slice) -> np.ndarray:
        if rows != self._tile[0]:  # tiles come row by row: a tile of images is put on the devices once
            tile = jax.tree.map(lambda x: slice_padded(x, rows, self._rows), self._images)
            self._tile = rows, from_full_copy(batch_sharding(self._mesh), tile)
        score = self._of_texts if self._plain else self._of_groups
        return score(self._tile[1], columns)[: rows.stop - rows.start]

    def _of_groups(self, images: Features, columns: slice) -> np.ndarray:
        groups, number, place = self._packed(columns.start, columns.stop)
        scores = np.asarray(self._step(images, groups, number))  # (I, K, T)
        return scores.reshape(len(scores), -1)[:, place]

    def _packed(self, start: int, stop: int):
        """The groups of texts `start : stop` on the devices, their number, and the texts' places; made once."""
        if (start, stop) not in self._groups:
            groups, number, place = pack(jax.tree.map(lambda x: x[start:stop], self._texts))
            whole = replicated(self._mesh)
            self._groups[start, stop] = from_full_copy(whole, groups), from_full_copy(whole, np.int32(number)), place
        return self._groups[start, stop]

    def _of_texts(self, images: Features, columns: slice) -> np.ndarray:
        scores = []
        for start in range(columns.start, columns.stop, UNTILED_BLOCK[1]):
            part = slice(start, min(start + UNTILED_BLOCK[1], columns.stop))
            texts = jax.tree.map(lambda x, part=part: slice_padded(x, part, UNTILED_BLOCK[1]), self._texts)
            scores.append(
                np.asarray(self._step(images, from_full_copy(replicated(self._mesh), texts)))[:, : part.stop - start]
            )
        return np.concatenate(scores, 1)


def slice_padded(x: np.ndarray, part: slice, size: int) -> np.ndarray:
    """Rows `part` of `x`, with rows of zeros up to `size`."""
    x = x[part]
    return x if len(x) == size else np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])
