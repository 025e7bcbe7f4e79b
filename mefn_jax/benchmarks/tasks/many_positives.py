"""COCO's test split with all positives of a query: ECCV Caption and CxC, and COCO's own recalls from the same scores.

I images, C captions, Q queries, N candidates, R_q positives of query q. A tie counts against the model: of equal
scores, those of negatives come first.
"""

import numpy as np

from mefn_jax import metrics
from mefn_jax.benchmarks.measures import Measure, combine_measures, mean_measure
from mefn_jax.benchmarks.outcome import Outcome
from mefn_jax.benchmarks.readers.coco import UNREACHABLE, CocoGallery
from mefn_jax.benchmarks.scorer import Scorer
from mefn_jax.data.digests import digest_text
from mefn_jax.runtime.console import print0
from mefn_jax.scoring.ranking import rank

FOLDS = 5  # COCO's 1K: the mean of five consecutive folds
QUERIES_AT_ONCE = 256
DIRECTION_NAMES = {"i2t": "image to text", "t2i": "text to image"}


def measure_gallery(scorer: Scorer, gallery: CocoGallery) -> Outcome:
    """Scores all pairs of a gallery, once: R@1, 5, 10, mAP@R and R-Precision with all positives, and COCO's recalls.

    All scores are kept, 4 bytes a pair: 500 MB for COCO 5K. Raises ConfigError if the model cannot take the images or
    captions, and TrainingError for a score that is not finite.
    """
    images = scorer.encode_images(gallery.images)
    text = scorer.describe_captions(gallery.captions, "the captions")
    matrix = np.empty((gallery.images.num_images, len(gallery.captions)), np.float32)  # (I, C)
    has_folds = gallery.own_order and len(matrix) % FOLDS == 0
    folds = (1, FOLDS) if has_folds else (1,)
    scores = scorer.scores(images, scorer.encode_captions(gallery.captions))
    ranking = rank(scores, gallery.caption_image, folds, show_progress=True, save_to=matrix)
    if not has_folds:
        print0("note: the images are not in the published order, so COCO's 1K (five folds) is left out")
    measures = measure_positives(matrix, gallery)
    measures += [
        measure
        for number, counts in ranking.counts.items()
        for measure in measure_own_recalls(counts, gallery.caption_image, number)
    ]
    sizes = {"images": len(matrix), "captions": len(gallery.captions)}
    sizes |= {f"queries {DIRECTION_NAMES[side]}": len(getattr(gallery, side)) for side in DIRECTION_NAMES}
    digest = digest_text(repr([digest_positives(gallery), gallery.captions]))
    return Outcome(measures, len(matrix), "images", digest, sizes | {"ties": "against the model"} | text)


def measure_positives(matrix: np.ndarray, gallery: CocoGallery) -> list[Measure]:
    """Returns the measures with all positives, from the scores `(I, C)`."""
    sides = {"i2t": (matrix, gallery.i2t, np.arange(len(matrix)))}
    sides["t2i"] = matrix.T, gallery.t2i, gallery.caption_image  # a caption is resampled with its image
    measures = []
    for side, (scores, positives, unit) in sides.items():
        queries = np.array(list(positives))
        counts = count_stronger(scores, positives)
        number = scores.shape[1]
        sizes = np.array([len(of_query) for of_query in positives.values()])
        present = np.array([np.sum(of_query != UNREACHABLE) for of_query in positives.values()])
        columns = {
            f"r{k}": ([min(n) + 1 <= k for n in counts], chance_recall(present, number, k)) for k in metrics.RECALLS
        }
        columns["map_at_r"] = [average_precision_at_r(n) for n in counts], chance_map_at_r(sizes, present, number)
        columns["r_precision"] = [r_precision(n) for n in counts], float(np.mean(present / number))
        measures += [
            mean_measure(
                DIRECTION_NAMES[side], column, np.array(values, float), unit[queries], len(matrix), 100 * chance
            )
            for column, (values, chance) in columns.items()
        ]
    return measures


def count_stronger(scores: np.ndarray, positives: dict[int, np.ndarray]) -> list[np.ndarray]:
    """Counts, for each positive of each query, the negatives that score at least as high.

    `scores` is `(queries, N)`; `positives[q]` are the positions of the R_q positives of query q, -1 for one that is not
    among the candidates, which counts as below all of them. Returns an array int64 `(R_q,)` for each query, in the
    order of `positives`; they rise, so the k-th belongs to the k-th best positive.
    """
    result, queries = [], list(positives)
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        block = queries[start : start + QUERIES_AT_ONCE]
        for query, row in zip(block, scores[block], strict=True):
            present = positives[query][positives[query] != UNREACHABLE]
            of_positives, negatives = np.sort(row[present])[::-1], np.sort(np.delete(row, present))
            stronger = np.full(len(positives[query]), len(row))
            stronger[: len(present)] = len(negatives) - np.searchsorted(negatives, of_positives, "left")
            result.append(stronger)
    return result


def average_precision_at_r(stronger: np.ndarray) -> float:
    """Computes mAP@R of one query (Musgrave et al. 2020): the mean over its R positives of the precision at the place
    of each that is among the first R results, 0 for the others. `stronger (R,)` is a result of `count_stronger`."""
    k = np.arange(1, len(stronger) + 1)
    places = k + stronger
    return float(np.sum(np.where(places <= len(stronger), k / places, 0.0)) / len(stronger))


def r_precision(stronger: np.ndarray) -> float:
    """Computes the share of positives among the first R results of one query (see `average_precision_at_r`)."""
    return float(np.mean(np.arange(1, len(stronger) + 1) + stronger <= len(stronger)))


def chance_recall(sizes: np.ndarray, number: int, k: int) -> float:
    """Returns the expected share of queries with a positive among their first k of `number` candidates in a random
    order; `sizes (Q,)` are the numbers of positives."""
    miss = np.ones(len(sizes))
    for place in range(min(k, number)):
        miss *= np.clip(number - sizes - place, 0, None) / (number - place)
    return float(np.mean(1 - miss))


def chance_map_at_r(sizes: np.ndarray, present: np.ndarray, number: int) -> float:
    """Returns the expected mAP@R of a random order of `number` candidates. A query has R positives, `sizes (Q,)`, of
    which r are candidates, `present (Q,)`: place i holds one with probability r / N, and then the places before it hold
    (i - 1) (r - 1) / (N - 1) others."""
    expected = []
    for size, of_candidates in zip(sizes.tolist(), present.tolist(), strict=True):
        places = np.arange(1, size + 1)
        others = (places - 1) * (of_candidates - 1) / max(1, number - 1)
        expected.append(np.sum((1 + others) / places) * of_candidates / (size * number))
    return float(np.mean(expected))


def measure_own_recalls(counts: tuple, caption_image: np.ndarray, folds: int) -> list[Measure]:
    """Returns COCO's recalls, of which a caption's own image is the one positive, averaged over `folds`; `counts` are
    those of `scoring.ranking.rank`."""
    images = int(caption_image.max()) + 1
    size, parts = images // folds, {}
    for fold in range(folds):
        chosen = np.flatnonzero(caption_image // size == fold)
        of_fold = caption_image[chosen] - fold * size
        i2t, t2i = metrics.best_ranks(*(n[chosen] for n in counts), of_fold)
        chances = metrics.chance_recalls(size, of_fold)
        for side, ranks, unit in (("i2t", i2t, np.arange(size) + fold * size), ("t2i", t2i, caption_image[chosen])):
            for k in metrics.RECALLS:
                measure = mean_measure("", f"r{k}", (ranks <= k).astype(float), unit, images, chances[side][f"r{k}"])
                parts.setdefault((side, f"r{k}"), []).append(measure)
    name = "COCO 5K" if folds == 1 else "COCO 1K"
    return [
        combine_measures(
            f"{name}, {DIRECTION_NAMES[side]}",
            column,
            of_folds,
            1 / folds,
            float(np.mean([x.chance for x in of_folds])),
        )
        for (side, column), of_folds in parts.items()
    ]


def digest_positives(gallery: CocoGallery) -> list:
    """Returns the names of the images and the positives of every query, as values for a digest."""
    sides = [
        sorted((query, sorted(of_query.tolist())) for query, of_query in side.items())
        for side in (gallery.i2t, gallery.t2i)
    ]
    return [gallery.caption_image.tolist(), *sides]
