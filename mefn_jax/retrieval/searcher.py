"""Searches an opened index with a loaded model: candidates by embedding, then the matcher's scores of these. Also ranks
captions for an image.

A `Searcher` answers any number of queries and compiles nothing twice: its programs have few shapes, powers of two up to
a limit. An image is scored with several queries at once where that costs no more than with one. Q queries, U images.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from mefn_jax.errors import DataError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.evaluation.rerank import parse_rerank
from mefn_jax.features import Features
from mefn_jax.retrieval.coarse import MAX_QUERIES, CoarseSearch
from mefn_jax.retrieval.index import Index, require_finite
from mefn_jax.scoring import certificate
from mefn_jax.scoring.tiles import TILE_CAPTIONS, TILE_IMAGES, even_slices

FIRST_CANDIDATES = 128  # images that a matcher with a bound scores first
DEFAULT_CANDIDATES = 1000  # images that the matcher scores for a caption: the nearest by embedding
# Queries whose candidates are scored together. So many captions of usual length fill one group of packed texts, which
# costs as much as one caption alone in it.
SHARED_QUERIES = 8


Report = Callable[[int, int], None]  # called with the number of images that are scored, and of those that are to be


def ignore(done: int, total: int) -> None:
    """Does nothing with a report."""


class Results(NamedTuple):
    """The best images of an index, or the best captions, for one query.

    Attributes:
        positions, scores: int64 and float32 `(k,)`, best first, equal scores by position.
        num_scored: images or captions that the matcher scored; 0 if the score is the product of the embeddings.
    """

    positions: np.ndarray
    scores: np.ndarray
    num_scored: int


def rank_captions(
    evaluator: Evaluator,
    params,
    image: Features,
    texts: Features,
    captions: list[str],
    top_k: int,
    report: Report = ignore,
) -> Results:
    """Returns the `top_k` best of C captions for an image, by the matcher's scores, which are all computed.

    `image` are the Features of the image, one row; `texts` those of the captions, C rows. Before each part of the
    captions is scored, `report` is called, and may raise to end the search. Raises TrainingError for scores that are
    not finite.
    """
    tiled_scores = evaluator.scores(params, image, texts)
    slices, scores = even_slices(len(captions), TILE_CAPTIONS), []
    for k, columns in enumerate(slices):
        report(k, len(slices))
        scores.append(tiled_scores(slice(0, 1), columns)[0])
    scores = np.concatenate(scores)
    require_finite(scores, captions)
    best = np.argsort(-scores, kind="stable")[:top_k]
    return Results(best, scores[best], len(scores))


class Searcher:
    """A loaded model and an opened index.

    The matcher scores the images nearest by embedding, as many as `rerank` says (a share, or a number; by default
    DEFAULT_CANDIDATES). Without `rerank`, a matcher with a bound scores as many as make sure that the results are those
    of all images. Raises ConfigError for a `rerank` that is neither, and DataError for an index whose embeddings do not
    fit the model.

    Attributes:
        evaluator, params: the compiled model and its parameters.
        index: the index.
        is_certified: whether the results are those of all images.
    """

    def __init__(self, evaluator: Evaluator, params, index: Index, rerank: str = ""):
        self.evaluator, self.params, self.index = evaluator, params, index
        self._num_candidates = parse_rerank(rerank, len(index.names)) if rerank else DEFAULT_CANDIDATES
        self.is_certified = evaluator.model.has_bound and not rerank
        self._coarse = CoarseSearch(index.embeddings, evaluator.mesh, index.readable)

    def search(self, texts: Features, top_k: int, report: Report = ignore) -> list[Results]:
        """Returns the `top_k` best images for each of Q encoded texts. Before some images are scored, `report` is
        called, and may raise to end the search. Raises TrainingError for scores that are not finite."""
        return list(self.search_batches(texts, top_k, report))

    def search_batches(self, texts: Features, top_k: int, report: Report = ignore) -> Iterator[Results]:
        """Yields what `search` returns, in order, as soon as a batch of queries is answered."""
        number = len(texts.mask)
        for first in range(0, number, MAX_QUERIES):
            batch = jax.tree.map(lambda x, first=first: x[first : first + MAX_QUERIES], texts)
            yield from self._search_batch(batch, top_k, report)

    def _search_batch(self, texts: Features, top_k: int, report: Report) -> Iterator[Results]:
        number = len(texts.mask)
        texts = _repeat_last(texts, 1 << (number - 1).bit_length())
        queries = self.evaluator.text_vectors(self.params, texts)[:number]
        if self.index.embeddings.shape[1:] != queries.shape[1:]:
            raise DataError(
                f"the index has vectors of {self.index.embeddings.shape[1:]}, the model of {queries.shape[1:]}: "
                "embeddings.npy is damaged; make the index again"
            )
        if self.is_certified:
            yield from self._search_certified(texts, queries, top_k, report)
            return
        positions, products = self._coarse.find(queries, max(top_k, self._num_candidates))
        if self.evaluator.model.is_dual_encoder:
            yield from (Results(p[:top_k], s[:top_k], 0) for p, s in zip(positions, products, strict=True))
            return
        shared = SHARED_QUERIES if self.evaluator.model.has_tile and number > 1 else 1
        for first in range(0, number, shared):
            group = positions[first : first + shared]
            scores = self._score_candidates(group, _take(texts, first, shared), report)
            for p, s in zip(group, scores, strict=True):
                yield Results(*(x[:top_k] for x in sort_results(p, s)), len(p))

    def _score_candidates(self, candidates: np.ndarray, texts: Features, report: Report) -> np.ndarray:
        """Returns the scores of each text with its own candidates, `(Q, k)`."""
        union, place = np.unique(candidates, return_inverse=True)
        scores = self.score_images(union, texts, report)
        return scores[place.reshape(candidates.shape), np.arange(len(candidates))[:, None]]

    def score_images(self, positions: np.ndarray, texts: Features, report: Report = ignore) -> np.ndarray:
        """Returns the matcher's scores of images of the index with texts, float32 `(U, Q)`, from the Features of a few
        images at a time. Raises TrainingError if one is not finite."""
        most = TILE_IMAGES * self.evaluator.mesh.size
        size, columns = min(most, 1 << (len(positions) - 1).bit_length()), slice(0, len(texts.mask))
        scores = []
        for first in range(0, len(positions), size):
            report(first, len(positions))
            part = positions[first : first + size]
            images = self.index.features(np.pad(part, (0, size - len(part)), mode="edge"))
            scores.append(self.evaluator.scores(self.params, images, texts)(slice(0, size), columns)[: len(part)])
        scores = np.concatenate(scores)
        require_finite(scores, [self.index.names[p] for p in positions])
        return scores

    def _search_certified(self, texts: Features, queries: np.ndarray, top_k: int, report: Report) -> Iterator[Results]:
        """Yields the results of queries whose texts' scores have a bound."""
        offsets = self.evaluator.hub_offsets(self.params, texts, texts)[1]
        for first in range(0, len(queries), SHARED_QUERIES):
            products = self._coarse.products(queries[first : first + SHARED_QUERIES])
            for n, row in enumerate(products, first):
                yield self._score_by_bound(_take(texts, n, 1), row, offsets[n], top_k, report)

    def _score_by_bound(self, text: Features, products: np.ndarray, text_offset: float, top_k: int, report: Report):
        """Scores images by falling products with the query, `(I,)`, until no other can be among the first `top_k`
        (docs/method.md, Eqs. 107 and 108), and returns the Results."""
        radius = self.evaluator.model.score_bound()[1] + certificate.ROUNDING
        total, number = int(self.index.readable.sum()), max(top_k, FIRST_CANDIDATES)
        order, scores = np.argsort(-products, kind="stable")[:total], np.empty(0, np.float32)
        while True:
            # From half of the images on, all: another round would save nothing.
            number = total if number > certificate.MOST * total else number
            scores = np.concatenate([scores, self.score_images(order[len(scores) : number], text, report)[:, 0]])
            kth_score = np.sort(scores)[-min(top_k, total)]
            if number >= total or products[order[number - 1]] - text_offset + radius < kth_score:
                best = sort_results(order[:number], scores)
                return Results(*(x[:top_k] for x in best), number)
            number *= 2


def sort_results(positions: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions and scores, best first, equal scores by position."""
    order = np.lexsort((positions, -scores))
    return positions[order], scores[order]


def _take(texts: Features, first: int, number: int) -> Features:
    """Returns `number` texts from `first` on."""
    return jax.tree.map(lambda x: x[first : first + number], texts)


def _repeat_last(features: Features, number: int) -> Features:
    """Returns Features filled up to `number` items with the last one."""
    rows = np.minimum(np.arange(number), len(features.mask) - 1)
    return jax.tree.map(lambda x: x[rows], features)
