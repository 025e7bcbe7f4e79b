"""Scores of all pairs, a tile at a time: memory grows with images plus captions, not with their product."""

from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from mefn_jax.errors import TrainingError
from mefn_jax.matching.features import Features
from mefn_jax.sharding import by_rows, put_whole, replicated

# scores(images, captions) -> float array (len(images), len(captions)), for half-open ranges of positions.
Scores = Callable[[slice, slice], np.ndarray]


def count_better(scores: Scores, caption_image: np.ndarray, tile_images: int, tile_captions: int, bar=False):
    """The counts that all metrics follow from: `(n_i2t, n_t2i)`, int64 `(C,)` each (see `metrics.py`).

    `caption_image` gives each caption's image. Each tile is scored once; those that hold a true pair come first and
    are kept (about I * tile_captions + C * tile_images numbers). Raises TrainingError for a score that is not finite.
    """
    images, captions = int(caption_image.max()) + 1, len(caption_image)
    tiles = [
        (slice(i, min(i + tile_images, images)), slice(c, min(c + tile_captions, captions)))
        for i in range(0, images, tile_images)
        for c in range(0, captions, tile_captions)
    ]
    kept, rest = {}, []
    own = np.empty(captions, np.float32)
    progress = tqdm(total=len(tiles), desc="scoring", unit=" tiles", disable=None if bar else True)
    for rows, columns in tiles:
        owners = caption_image[columns]
        true = np.flatnonzero((owners >= rows.start) & (owners < rows.stop))
        if not len(true):
            rest.append((rows, columns))
            continue
        tile = kept[rows.start, columns.start] = _finite(scores(rows, columns), rows, columns)
        own[columns.start + true] = tile[owners[true] - rows.start, true]
        progress.update()

    n_i2t, n_t2i = np.zeros(captions, np.int64), np.zeros(captions, np.int64)
    by_image = np.argsort(caption_image, kind="stable")
    bounds = np.searchsorted(caption_image[by_image], np.arange(images + 1))
    for rows, columns in tiles:
        tile = kept.pop((rows.start, columns.start), None)
        if tile is None:
            tile = _finite(scores(rows, columns), rows, columns)
            progress.update()
        owners = caption_image[columns]
        other = owners[None, :] != np.arange(rows.start, rows.stop)[:, None]  # (rows, columns)
        n_t2i[columns] += np.sum(other & (tile >= own[None, columns]), axis=0)
        mine = by_image[bounds[rows.start] : bounds[rows.stop]]  # the captions of this tile's images
        row = caption_image[mine] - rows.start
        n_i2t[mine] += np.sum(other[row] & (tile[row] >= own[mine, None]), axis=1)
    progress.close()
    return n_i2t, n_t2i


def _finite(tile: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    # A NaN would rank first under a reversed sort and look like a perfect model.
    if not np.all(np.isfinite(tile)):
        i, c = np.argwhere(~np.isfinite(tile))[0]
        raise TrainingError(
            f"the score of image {rows.start + i} and caption {columns.start + c} is {tile[i, c]}; the parameters or "
            "features are not finite"
        )
    return tile


class FeatureScores:
    """`Scores` of encoded images and texts by a compiled matcher, each tile's images split over the devices.

    `score(images, texts)` takes Features; `images`, `texts` are Features of NumPy arrays. Tiles are padded to one
    shape, so that nothing is compiled twice.
    """

    def __init__(self, score, images: Features, texts: Features, tile_images: int, tile_captions: int, mesh):
        # Rows are split over the devices, so their number is rounded up to a multiple of it.
        self.tile_images = -(-tile_images // mesh.size) * mesh.size
        self.tile_captions = tile_captions
        self._score, self._images, self._texts, self._mesh = score, images, texts, mesh
        self._rows, self._tile = None, None

    def __call__(self, rows: slice, columns: slice) -> np.ndarray:
        if rows != self._rows:  # tiles come row by row: an image tile is put on the devices once
            tile = jax.tree.map(lambda x: _cut(x, rows, self.tile_images), self._images)
            self._rows, self._tile = rows, put_whole(by_rows(self._mesh), tile)
        texts = jax.tree.map(lambda x: _cut(x, columns, self.tile_captions), self._texts)
        scores = self._score(self._tile, put_whole(replicated(self._mesh), texts))
        return np.asarray(scores)[: rows.stop - rows.start, : columns.stop - columns.start]


def _cut(x: np.ndarray, part: slice, size: int) -> np.ndarray:
    x = x[part]
    return x if len(x) == size else np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])
