"""First results of every query, exactly and without scoring all pairs (docs/method.md, Eqs. 107 and 108).

It serves matchers with a bound (`Matcher.score_bound`): a score is at most its *center*, a product of two vectors minus
known offsets, plus a radius. A query's pairs are scored by falling centers until the next pair cannot reach the k-th
best score that was found: no other pair can be among the first k, or equal the k-th. Nothing treats a true pair in
another way than any other. I images, C captions, P pairs of a list.
"""

import dataclasses
import functools

import jax
import numpy as np

from mefn_jax.errors import TrainingError
from mefn_jax.runtime.sharding import BATCH_AXES, batch_sharding, from_full_copy, replicated
from mefn_jax.scoring.ranking import Ranking, TopK, check_finite
from mefn_jax.scoring.rerank import pack_sort_key, take_rows
from mefn_jax.scoring.tiles import Scores, even_slices

MOST = 0.5  # share of all pairs from which on all are scored: each costs less in a tile than in a list
ROUNDING = 1e-5  # added to the radius: errors of float32 in scores and centers
BLOCK_PAIRS = 1 << 20  # queries x candidates whose centers are in memory at once
LIST_PAIRS = 1 << 16  # largest number of listed pairs that a device gets in one call
SMALLEST_LIST = (
    1 << 10
)  # smallest number in a call: lists are filled up to a power of two, so few programs are compiled
GROWTH = 1.5  # factor between the candidates of a query in one round and in the next


def compile_list_scorer(score_pairs, mesh):
    """Returns the compiled program `scorer(params, images, texts, rows, columns, at_once)`, float32 `(P,)`: the scores
    of pairs of prepared items, image `rows[p]` with text `columns[p]`, before the hubness offsets are subtracted.

    `score_pairs(params, images, texts)` is the matcher's. P is a power of two times the number of devices, and a device
    scores `at_once` pairs at a time, a power of two as well.
    """

    def score_on_device(at_once, params, images, texts, rows, columns):
        def score(listed):
            return score_pairs(params, *map(take_rows, (images, texts), listed))

        size = min(at_once, len(rows))
        return jax.lax.map(score, (rows.reshape(-1, size), columns.reshape(-1, size))).reshape(-1)

    rows, replicas = jax.sharding.PartitionSpec(BATCH_AXES), jax.sharding.PartitionSpec()
    specs = replicas, replicas, replicas, rows, rows

    def score_list(*inputs):
        *inputs, at_once = inputs
        score = functools.partial(score_on_device, at_once)
        return jax.shard_map(score, mesh=mesh, in_specs=specs, out_specs=rows)(*inputs)

    return jax.jit(score_list, static_argnums=5, out_shardings=replicated(mesh))


class ListedScores:
    """Scores of listed pairs: `scores(rows, columns)`, float32 `(P,)`.

    `scorer` is a program of `compile_list_scorer` with its parameters bound, `images` and `texts` are prepared items;
    `hub_offsets`, float32 `(I,)` and `(C,)`, are subtracted from its result. A device scores at most `max_pairs` pairs
    at once.
    """

    def __init__(self, scorer, images, texts, mesh, hub_offsets, max_pairs: int):
        self._scorer, self._items, self._mesh, self._hub_offsets = scorer, (images, texts), mesh, hub_offsets
        self._at_once = 1 << (max_pairs.bit_length() - 1)  # the largest power of two

    def __call__(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Returns the scores of images `rows (P,)` with texts `columns (P,)`. Raises TrainingError if one is not
        finite."""
        parts = even_slices(len(rows), LIST_PAIRS * self._mesh.size) if len(rows) else []
        scores = np.concatenate([np.zeros(0, np.float32), *(self._score(rows[p], columns[p]) for p in parts)])
        image_offsets, text_offsets = self._hub_offsets
        scores = scores - image_offsets[rows] - text_offsets[columns]
        if not np.all(np.isfinite(scores)):
            p = int(np.argmin(np.isfinite(scores)))
            raise TrainingError(
                f"the score of image {rows[p]} and caption {columns[p]} is {scores[p]}; the parameters or features are "
                "not finite"
            )
        return scores

    def _score(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        devices = self._mesh.size
        size = devices << max(SMALLEST_LIST.bit_length() - 1, (-(-len(rows) // devices) - 1).bit_length())
        listed = [np.pad(np.int32(x), (0, size - len(x))) for x in (rows, columns)]
        on_devices = from_full_copy(batch_sharding(self._mesh), tuple(listed))
        return np.asarray(self._scorer(*self._items, *on_devices, self._at_once))[: len(rows)]


@dataclasses.dataclass(frozen=True)
class FirstResults:
    """Pairs that were scored until the first k results of every query were known.

    Attributes:
        images, captions, scores: of each pair, int64, int64 and float32 `(P,)`; no pair occurs twice.
        k: number of first results that are exact for each image and for each caption.
        shares: of all pairs, those that the captions' rankings needed, and those that the images' needed besides.
    """

    images: np.ndarray
    captions: np.ndarray
    scores: np.ndarray
    k: int
    shares: tuple[float, float]


def find_first_results(
    centers: Scores, radius: float, score_listed, images: int, captions: int, k: int
) -> FirstResults | None:
    """Scores the pairs that can be among the first k of any image or caption, and returns them; None as soon as these
    seem to be more than MOST of all pairs.

    `centers(rows, columns)` returns the middles of the intervals that hold the scores of a range of images and of
    captions, and `radius` is half their length; `score_listed(rows, columns)` returns scores of listed pairs.
    """
    found = [np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)]
    shares = []
    for by_caption, queries, candidates in ((True, captions, images), (False, images, captions)):
        whole, num_scored = slice(0, candidates), 0
        for part in even_slices(queries, max(1, BLOCK_PAIRS // candidates)):
            rows, columns = (whole, part) if by_caption else (part, whole)
            middle = check_finite(centers(rows, columns), rows, columns)
            of_query, of_candidate = found[:2] if not by_caption else found[1::-1]
            known = (of_query >= part.start) & (of_query < part.stop)
            known = of_query[known] - part.start, of_candidate[known], found[2][known]

            def score(query, candidate, start=part.start, by_caption=by_caption):
                pair = query + start, candidate
                return score_listed(*(pair[::-1] if by_caption else pair))

            upper = (middle.T if by_caption else middle) + np.float32(radius + ROUNDING)
            query, candidate, scores = _score_by_bound(upper, score, known, min(k, candidates))
            pair = query + part.start, candidate
            new = *(pair[::-1] if by_caption else pair), scores
            found = [np.concatenate(x) for x in zip(found, new, strict=True)]
            num_scored += len(scores)
            if sum(shares) + num_scored / (part.stop * candidates) > MOST:
                return None
        shares.append(num_scored / (images * captions))
    return FirstResults(*found, k, tuple(shares))


def _score_by_bound(upper: np.ndarray, score, known: tuple, k: int):
    """Scores candidates until none that is left can reach the k-th best score of its query.

    `upper (Q, N)` are upper bounds of the scores, `score(queries, candidates)` returns scores of pairs, and `known` are
    the queries, candidates and scores of pairs that are scored already. Returns the same three of the new pairs.
    """
    queries, candidates = upper.shape
    order, is_scored = np.argsort(-upper, axis=1), np.zeros(upper.shape, bool)
    is_scored[known[:2]] = True
    best = _best_known(known, queries, k)  # (Q, k); its smallest is the k-th best score so far
    active, start, size, new = np.arange(queries), 0, k, []
    while len(active) and start < candidates:
        next_candidates = order[active, start : start + size]
        bounds = np.take_along_axis(upper[active], next_candidates, 1)
        needed = (bounds >= best[active].min(1, keepdims=True)) & ~is_scored[active[:, None], next_candidates]
        row, place = np.nonzero(needed)
        pairs = active[row], next_candidates[row, place]
        scores = np.full(needed.shape, -np.inf, np.float32)
        scores[row, place] = score(*pairs)
        is_scored[pairs] = True
        new.append((*pairs, scores[row, place]))
        best[active] = _largest(np.concatenate([best[active], scores], 1), k)
        start += size
        size = int(GROWTH * size)
        if start < candidates:
            active = active[upper[active, order[active, start]] >= best[active].min(1)]
    return tuple(np.concatenate(x) for x in zip(*new, strict=True))


def _best_known(known: tuple, queries: int, k: int) -> np.ndarray:
    """Returns the k largest known scores of each query, `(Q, k)`, -inf where it has fewer."""
    query, _, scores = known
    order = np.lexsort((-scores, query))
    place = np.arange(len(query)) - np.searchsorted(query[order], query[order])  # within its query
    kept = place < k
    best = np.full((queries, k), -np.inf, np.float32)
    best[query[order][kept], place[kept]] = scores[order][kept]
    return best


def _largest(x: np.ndarray, k: int) -> np.ndarray:
    """Returns the k largest values of each row, in any order."""
    return -np.partition(-x, k - 1, axis=1)[:, :k]


def rank_first_results(first: FirstResults, caption_image: np.ndarray) -> Ranking:
    """Returns the Ranking of the whole gallery as far as it is known: the first k results of every query, and counts
    that are exact below k. A count of k stands for k or more, and a positive score that was not needed is NaN."""
    k, num_images, num_captions = first.k, int(caption_image.max()) + 1, len(caption_image)
    relevant = caption_image[first.captions] == first.images
    positive_scores = np.full(num_captions, np.nan, np.float32)
    positive_scores[first.captions[relevant]] = first.scores[relevant]
    is_known = ~np.isnan(positive_scores)
    negative = tuple(x[~relevant] for x in (first.images, first.captions, first.scores))
    counts = []
    for query, of_caption in ((negative[0], caption_image), (negative[1], np.arange(num_captions))):
        keys = np.sort(pack_sort_key(query, negative[2]))  # by query, then by score
        end = np.searchsorted(keys, pack_sort_key(of_caption, np.float32(np.inf)), "right")
        start = np.searchsorted(keys, pack_sort_key(of_caption, np.where(is_known, positive_scores, np.float32(0))))
        counts.append(np.where(is_known, np.minimum(end - start, k), k).astype(np.int64))
    return Ranking(
        counts={1: tuple(counts)},
        positive_scores=positive_scores,
        top_captions=_take_first(
            num_images, min(k, num_captions), first.images, first.captions, first.scores, relevant
        ),
        top_images=_take_first(num_captions, min(k, num_images), first.captions, first.images, first.scores, relevant),
    )


def _take_first(queries: int, k: int, query, candidate, scores, relevant) -> TopK:
    """Returns the first k results of each query, in the order of TopK."""
    order = np.lexsort((candidate, relevant, -scores, query))
    place = np.arange(len(query)) - np.searchsorted(query[order], query[order])
    order, place = order[place < k], place[place < k]
    top = TopK.empty(queries, k)
    where = query[order], place
    top.positions[where], top.scores[where], top.relevant[where] = candidate[order], scores[order], relevant[order]
    return top
