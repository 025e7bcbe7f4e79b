"""Ranks and the best few of every query from scores of all pairs that come a tile at a time: memory grows with images
plus captions, not with their product."""

import dataclasses
import time

import numpy as np
from tqdm import tqdm

from mefn_jax.errors import DataError, TrainingError
from mefn_jax.scoring.tiles import TILE_CAPTIONS, TILE_IMAGES, Scores, even_slices


@dataclasses.dataclass
class TopK:
    """The best k of each of Q queries so far: positions int64 `(Q, k)`, -1 where there are fewer, best first, and their
    scores float32. Equal scores: what is not relevant first (a tie counts against the model), then by position."""

    positions: np.ndarray
    scores: np.ndarray
    relevant: np.ndarray

    @classmethod
    def empty(cls, queries: int, k: int) -> "TopK":
        return cls(np.full((queries, k), -1), np.full((queries, k), -np.inf, np.float32), np.ones((queries, k), bool))

    def update(self, queries: slice, first: int, scores: np.ndarray, relevant: np.ndarray) -> None:
        """Candidates from position `first` on: `scores`, and whether they are `relevant`, `(len(queries), n)`."""
        k = self.positions.shape[1]
        # Most tiles have nothing for most queries: these cost one comparison.
        rows = np.flatnonzero(np.any(scores >= self.scores[queries, -1:], 1)) if k else np.empty(0, int)
        if not len(rows):
            return
        at = queries.start + rows
        positions = np.broadcast_to(first + np.arange(scores.shape[1]), (len(rows), scores.shape[1]))
        positions = np.concatenate([self.positions[at], positions], 1)
        scores = np.concatenate([self.scores[at], scores[rows]], 1)
        relevant = np.concatenate([self.relevant[at], relevant[rows]], 1)
        # Those that cannot be among the best k, ties or not, are left out before sorting.
        least = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
        number = int(np.max(np.sum(scores >= least, 1)))
        some = np.argsort(scores < least, axis=1, kind="stable")[:, :number]
        positions, scores, relevant = (np.take_along_axis(x, some, 1) for x in (positions, scores, relevant))
        order = np.lexsort((positions, relevant, -scores), axis=1)[:, :k]
        self.positions[at], self.scores[at], self.relevant[at] = (
            np.take_along_axis(x, order, 1) for x in (positions, scores, relevant)
        )


@dataclasses.dataclass
class Ranking:
    """What is kept of all scores of I images and C captions.

    Attributes:
        counts: by the number of folds, `(n_i2t, n_t2i)`, int64 `(C,)` each: what all metrics follow from (see
            `metrics.py`). Folds are of consecutive images; a fold's counts are of its own images and captions alone.
        own: float32 `(C,)`, the score of each caption with its image.
        captions, images: the best captions of every image, and images of every caption, of the whole gallery.
        seconds: how long it took.
    """

    counts: dict[int, tuple[np.ndarray, np.ndarray]]
    positive_scores: np.ndarray
    top_captions: TopK
    top_images: TopK
    seconds: float = 0.0


def rank(
    scores: Scores, caption_image: np.ndarray, folds=(1,), best: int = 0, bar: bool = False, save_to=None
) -> Ranking:
    """Ranks all pairs, each scored once. `caption_image` gives each caption's image, `folds` numbers of folds that
    divide the images (captions in the order of their images then), `best` how many of every query are kept.

    With one number of folds alone, pairs across them are not scored. `save_to`, a float32 array `(I, C)`,
    perhaps on disk, is filled with the scores. Tiles that hold a true pair come first and are kept until the others
    are counted (about C times IMAGES numbers). Raises TrainingError for a score that is not finite, and DataError for
    an image without captions, which has no rank, before the last that has some.
    """
    without = np.flatnonzero(np.bincount(caption_image) == 0)
    if len(without):
        raise DataError(f"image {without[0]} of the gallery has no caption: leave it out")
    begun, images, captions = time.perf_counter(), int(caption_image.max()) + 1, len(caption_image)
    own = np.empty(captions, np.float32)
    counts = {number: (np.zeros(captions, np.int64), np.zeros(captions, np.int64)) for number in folds}
    found = Ranking(counts, own, TopK.empty(images, min(best, captions)), TopK.empty(captions, min(best, images)))
    tiles = list_tiles(images, caption_image, folds[0] if len(folds) == 1 else 1)
    progress = tqdm(
        total=sum((r.stop - r.start) * (c.stop - c.start) for r, c in tiles),
        desc="scoring",
        unit=" pairs",
        unit_scale=True,
        disable=None if bar else True,
    )

    def scored(rows, columns):
        tile = check_finite(scores(rows, columns), rows, columns)
        progress.update(tile.size)
        if save_to is not None:
            save_to[rows, columns] = tile
        return tile

    kept = {}
    for rows, columns in tiles:
        owners = caption_image[columns]
        true = np.flatnonzero((owners >= rows.start) & (owners < rows.stop))
        if len(true):
            tile = kept[rows.start, columns.start] = scored(rows, columns)
            own[columns.start + true] = tile[owners[true] - rows.start, true]
    by_image = np.argsort(caption_image, kind="stable")
    bounds = np.searchsorted(caption_image[by_image], np.arange(images + 1))
    for rows, columns in tiles:
        tile = kept.pop((rows.start, columns.start), None)
        tile = scored(rows, columns) if tile is None else tile
        owners, here = caption_image[columns], np.arange(rows.start, rows.stop)
        other = owners[None, :] != here[:, None]  # (rows, columns)
        mine = by_image[bounds[rows.start] : bounds[rows.stop]]  # the captions of this tile's images
        row = caption_image[mine] - rows.start
        before_caption = other & (tile >= own[None, columns])
        before_image = other[row] & (tile[row] >= own[mine, None])
        for number, (n_i2t, n_t2i) in counts.items():
            fold = images // number
            same = here[:, None] // fold == owners[None, :] // fold
            n_t2i[columns] += np.sum(before_caption & same, axis=0)
            n_i2t[mine] += np.sum(before_image & same[row], axis=1)
        found.top_captions.update(rows, columns.start, tile, ~other)
        found.top_images.update(columns, rows.start, tile.T, ~other.T)
    progress.close()
    found.seconds = time.perf_counter() - begun
    return found


def list_tiles(images: int, caption_image: np.ndarray, folds: int) -> list[tuple[slice, slice]]:
    """The tiles of all pairs, or of those inside of each fold, row by row."""
    tiles, size = [], images // folds
    for first in range(0, images, size):
        inside = np.flatnonzero((caption_image >= first) & (caption_image < first + size))
        start, stop = (int(inside[0]), int(inside[-1]) + 1) if folds > 1 else (0, len(caption_image))
        for rows in even_slices(size, TILE_IMAGES):
            for columns in even_slices(stop - start, TILE_CAPTIONS):
                tiles.append((shift(rows, first), shift(columns, start)))
    return tiles


def shift(part: slice, by: int) -> slice:
    """A range of positions, further on."""
    return slice(part.start + by, part.stop + by)


def check_finite(tile: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """The tile. Raises TrainingError naming a pair whose score is not finite: a NaN would rank first under a reversed
    sort and look like a perfect model."""
    if not np.all(np.isfinite(tile)):
        i, c = np.argwhere(~np.isfinite(tile))[0]
        raise TrainingError(
            f"the score of image {rows.start + i} and caption {columns.start + c} is {tile[i, c]}; the parameters or "
            "features are not finite"
        )
    return tile
