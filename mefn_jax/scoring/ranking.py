"""Ranks and top results of every query, from scores of all pairs that come a tile at a time: memory grows with images
plus captions, not with their product."""

import dataclasses
import time

import numpy as np
from tqdm import tqdm

from mefn_jax.errors import DataError, TrainingError
from mefn_jax.scoring.tiles import TILE_CAPTIONS, TILE_IMAGES, Scores, even_slices


@dataclasses.dataclass
class TopK:
    """Best k results so far of each of Q queries, best first.

    Among equal scores, results that are not relevant come first (a tie counts against the model), then lower positions.

    Attributes:
        positions: int64 `(Q, k)`, -1 where a query has fewer results.
        scores: float32 `(Q, k)`, -inf where a query has fewer results.
        relevant: bool `(Q, k)`, whether a result is correct.
    """

    positions: np.ndarray
    scores: np.ndarray
    relevant: np.ndarray

    @classmethod
    def empty(cls, queries: int, k: int) -> "TopK":
        """Returns a TopK of `queries` queries without results."""
        return cls(np.full((queries, k), -1), np.full((queries, k), -np.inf, np.float32), np.ones((queries, k), bool))

    def update(self, queries: slice, first: int, scores: np.ndarray, relevant: np.ndarray) -> None:
        """Adds candidates at the positions from `first` on to a range of queries: their `scores`, and whether they are
        `relevant`, `(len(queries), n)` each."""
        k = self.positions.shape[1]
        # Most tiles hold no new result for most queries: these cost one comparison.
        rows = np.flatnonzero(np.any(scores >= self.scores[queries, -1:], 1)) if k else np.empty(0, int)
        if not len(rows):
            return
        query_index = queries.start + rows
        positions = np.broadcast_to(first + np.arange(scores.shape[1]), (len(rows), scores.shape[1]))
        positions = np.concatenate([self.positions[query_index], positions], 1)
        scores = np.concatenate([self.scores[query_index], scores[rows]], 1)
        relevant = np.concatenate([self.relevant[query_index], relevant[rows]], 1)
        # Candidates below the k-th best score cannot be among the best k, whatever the ties; they are left unsorted.
        kth_score = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
        num_kept = int(np.max(np.sum(scores >= kth_score, 1)))
        columns = np.argsort(scores < kth_score, axis=1, kind="stable")[:, :num_kept]
        positions, scores, relevant = (np.take_along_axis(x, columns, 1) for x in (positions, scores, relevant))
        order = np.lexsort((positions, relevant, -scores), axis=1)[:, :k]
        self.positions[query_index], self.scores[query_index], self.relevant[query_index] = (
            np.take_along_axis(x, order, 1) for x in (positions, scores, relevant)
        )


@dataclasses.dataclass
class Ranking:
    """Summary of the scores of I images and C captions.

    Attributes:
        counts: for each number of folds, `(n_i2t, n_t2i)`, int64 `(C,)` each, from which all metrics follow (see
            `metrics.py`; docs/method.md, Eqs. 56 and 57). Folds are consecutive images with their captions; counts stay
            within a fold.
        positive_scores: float32 `(C,)`, the score of each caption with its image.
        top_captions: the best captions of every image, in the whole gallery.
        top_images: the best images of every caption, in the whole gallery.
        seconds: duration of the scoring and ranking.
    """

    counts: dict[int, tuple[np.ndarray, np.ndarray]]
    positive_scores: np.ndarray
    top_captions: TopK
    top_images: TopK
    seconds: float = 0.0


def rank(
    scores: Scores, caption_image: np.ndarray, folds=(1,), top_k: int = 0, show_progress: bool = False, save_to=None
) -> Ranking:
    """Scores every pair once and counts in both directions, for each caption, the negatives that score at least as high
    as its positive (docs/method.md, Eqs. 56 and 57).

    `caption_image (C,)` is each caption's image. `folds` are numbers of folds that divide the images (captions must
    then be in the order of their images); with a single number, pairs across folds are not scored. `top_k` is the
    number of top results to keep for every query. `show_progress` draws a bar. `save_to`, a float32 array `(I, C)`,
    perhaps on disk, is filled with the scores.

    Tiles with a positive pair are scored first and kept until their negatives are counted (about C times TILE_IMAGES
    numbers). Raises TrainingError for a score that is not finite, and DataError for an image that has no caption (and
    therefore no rank) while a later image has one.
    """
    uncaptioned = np.flatnonzero(np.bincount(caption_image) == 0)
    if len(uncaptioned):
        raise DataError(f"image {uncaptioned[0]} of the gallery has no caption: leave it out")
    start_time, images, captions = time.perf_counter(), int(caption_image.max()) + 1, len(caption_image)
    positive_scores = np.empty(captions, np.float32)
    counts = {number: (np.zeros(captions, np.int64), np.zeros(captions, np.int64)) for number in folds}
    ranking = Ranking(
        counts, positive_scores, TopK.empty(images, min(top_k, captions)), TopK.empty(captions, min(top_k, images))
    )
    tiles = list_tiles(images, caption_image, folds[0] if len(folds) == 1 else 1)
    progress = tqdm(
        total=sum((r.stop - r.start) * (c.stop - c.start) for r, c in tiles),
        desc="scoring",
        unit=" pairs",
        unit_scale=True,
        disable=None if show_progress else True,
    )

    def score_tile(rows, columns):
        tile = check_finite(scores(rows, columns), rows, columns)
        progress.update(tile.size)
        if save_to is not None:
            save_to[rows, columns] = tile
        return tile

    positive_tiles = {}
    for rows, columns in tiles:
        column_image = caption_image[columns]
        positives = np.flatnonzero((column_image >= rows.start) & (column_image < rows.stop))
        if len(positives):
            tile = positive_tiles[rows.start, columns.start] = score_tile(rows, columns)
            positive_scores[columns.start + positives] = tile[column_image[positives] - rows.start, positives]
    captions_by_image = np.argsort(caption_image, kind="stable")
    bounds = np.searchsorted(caption_image[captions_by_image], np.arange(images + 1))
    for rows, columns in tiles:
        tile = positive_tiles.pop((rows.start, columns.start), None)
        tile = score_tile(rows, columns) if tile is None else tile
        column_image, row_image = caption_image[columns], np.arange(rows.start, rows.stop)
        negative = column_image[None, :] != row_image[:, None]  # (rows, columns)
        row_captions = captions_by_image[bounds[rows.start] : bounds[rows.stop]]  # all captions of this tile's images
        row = caption_image[row_captions] - rows.start
        stronger_images = negative & (tile >= positive_scores[None, columns])
        stronger_captions = negative[row] & (tile[row] >= positive_scores[row_captions, None])
        for number, (n_i2t, n_t2i) in counts.items():
            fold_size = images // number
            same_fold = row_image[:, None] // fold_size == column_image[None, :] // fold_size
            n_t2i[columns] += np.sum(stronger_images & same_fold, axis=0)
            n_i2t[row_captions] += np.sum(stronger_captions & same_fold[row], axis=1)
        ranking.top_captions.update(rows, columns.start, tile, ~negative)
        ranking.top_images.update(columns, rows.start, tile.T, ~negative.T)
    progress.close()
    ranking.seconds = time.perf_counter() - start_time
    return ranking


def list_tiles(images: int, caption_image: np.ndarray, folds: int) -> list[tuple[slice, slice]]:
    """Returns the tiles of all pairs, or of the pairs within each fold, row by row: ranges of images and captions."""
    tiles, size = [], images // folds
    for first in range(0, images, size):
        fold_captions = np.flatnonzero((caption_image >= first) & (caption_image < first + size))
        start, stop = (int(fold_captions[0]), int(fold_captions[-1]) + 1) if folds > 1 else (0, len(caption_image))
        for rows in even_slices(size, TILE_IMAGES):
            for columns in even_slices(stop - start, TILE_CAPTIONS):
                tiles.append((shift(rows, first), shift(columns, start)))
    return tiles


def shift(positions: slice, by: int) -> slice:
    """Returns a range of positions moved on by `by`."""
    return slice(positions.start + by, positions.stop + by)


def check_finite(tile: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """Returns the tile. Raises TrainingError naming a pair whose score is not finite: a NaN would rank first under a
    reversed sort and look like a perfect model."""
    if not np.all(np.isfinite(tile)):
        i, c = np.argwhere(~np.isfinite(tile))[0]
        raise TrainingError(
            f"the score of image {rows.start + i} and caption {columns.start + c} is {tile[i, c]}; the parameters or "
            "features are not finite"
        )
    return tile
