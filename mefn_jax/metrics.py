"""Retrieval metrics from counts (DESIGN.md 8, PEERS.md 2). I images, C captions, each of one image.

Everything follows from two counts a caption, which can be made tile by tile (`ranking.py`):
`n_i2t[c]`, how many captions of *other* images score at least as high against c's image as c does;
`n_t2i[c]`, how many *other* images score at least as high against c as its own does. A tie counts against the model.
"""

import numpy as np

RECALLS = (1, 5, 10)


def best_ranks(n_i2t: np.ndarray, n_t2i: np.ndarray, caption_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 1: of each image's best caption `(I,)`, and of each caption's image `(C,)`; int64."""
    images = int(caption_image.max()) + 1
    best = np.full(images, np.iinfo(np.int64).max)
    np.minimum.at(best, caption_image, n_i2t)
    return best + 1, n_t2i.astype(np.int64) + 1


def average_precision(n_i2t: np.ndarray, caption_image: np.ndarray) -> np.ndarray:
    """Average precision of each image's ranking of all captions, float64 `(I,)` in [0, 1]:
    `(1 / |G|) sum_k k / (k + n(g_k))` over its captions by falling score."""
    order = np.lexsort((n_i2t, caption_image))  # within an image, falling score is rising n
    owner, n = caption_image[order], n_i2t[order]
    number = np.bincount(caption_image)
    k = np.arange(len(owner)) - np.repeat(np.cumsum(number) - number, number) + 1
    return np.bincount(owner, weights=k / (k + n)) / number


def recalls(ranks: np.ndarray) -> dict:
    """`{r1, r5, r10}` in percent, and the median and mean rank `{medr, meanr}`."""
    values = {f"r{k}": 100.0 * float(np.mean(ranks <= k)) for k in RECALLS}
    return values | {"medr": float(np.median(ranks)), "meanr": float(np.mean(ranks))}


def retrieval_metrics(n_i2t: np.ndarray, n_t2i: np.ndarray, caption_image: np.ndarray) -> dict:
    """`{"i2t": {r1, r5, r10, medr, meanr, map}, "t2i": {...}, "rsum"}`, recalls, map and rsum in percent."""
    i2t, t2i = best_ranks(n_i2t, n_t2i, caption_image)
    result = {
        "i2t": recalls(i2t) | {"map": 100.0 * float(np.mean(average_precision(n_i2t, caption_image)))},
        # One relevant image: its average precision is one over its rank.
        "t2i": recalls(t2i) | {"map": 100.0 * float(np.mean(1.0 / t2i))},
    }
    return result | {"rsum": sum(result[d][f"r{k}"] for d in ("i2t", "t2i") for k in RECALLS)}


def average_metrics(results: list[dict]) -> dict:
    """The mean of several results of `summarise`, number by number (the folds of COCO 1K)."""
    first = results[0]
    return {
        key: average_metrics([r[key] for r in results])
        if isinstance(value, dict)
        else float(np.mean([r[key] for r in results]))
        for key, value in first.items()
    }


def chance_recalls(images: int, caption_image: np.ndarray) -> dict:
    """Expected recalls of a random order, in percent: `{"i2t": {r1, r5, r10}, "t2i": {...}}`."""
    captions = len(caption_image)
    t2i = {f"r{k}": 100.0 * min(1.0, k / images) for k in RECALLS}
    i2t = {}
    for k in RECALLS:
        missed = np.ones(images)
        for place in range(min(k, captions)):  # none of an image's captions in the first k places
            missed *= np.clip(captions - np.bincount(caption_image) - place, 0, None) / (captions - place)
        i2t[f"r{k}"] = 100.0 * float(np.mean(1 - missed))
    return {"i2t": i2t, "t2i": t2i}
