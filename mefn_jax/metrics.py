"""Retrieval metrics from counts (docs/method.md, section 13). I images, C captions, each of one image.

All metrics follow from two counts for each caption c, which `scoring/ranking.py` makes tile by tile:
`n_i2t[c]` (Eq. 56), the number of captions of *other* images that score at least as high with c's image as c does;
`n_t2i[c]` (Eq. 57), the number of *other* images that score at least as high with c as c's image does.
A tie counts against the model.
"""

import numpy as np

RECALLS = (1, 5, 10)


def best_ranks(n_i2t: np.ndarray, n_t2i: np.ndarray, caption_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ranks, from 1, of each image's best caption `(I,)` and of each caption's image `(C,)`, int64
    (docs/method.md, Eq. 58)."""
    images = int(caption_image.max()) + 1
    best = np.full(images, np.iinfo(np.int64).max)
    np.minimum.at(best, caption_image, n_i2t)
    return best + 1, n_t2i.astype(np.int64) + 1


def average_precision(n_i2t: np.ndarray, caption_image: np.ndarray) -> np.ndarray:
    """Computes the average precision of each image's ranking of all captions, float64 `(I,)` in [0, 1]:
    `mean_k k / (k + n_k)` over its captions by falling score (docs/method.md, Eq. 60)."""
    order = np.lexsort((n_i2t, caption_image))  # within an image, falling score is rising n
    image_index, n = caption_image[order], n_i2t[order]
    num_captions = np.bincount(caption_image)  # of each image
    k = np.arange(len(image_index)) - np.repeat(np.cumsum(num_captions) - num_captions, num_captions) + 1
    return np.bincount(image_index, weights=k / (k + n)) / num_captions


def recalls(ranks: np.ndarray) -> dict:
    """Returns `{r1, r5, r10}` in percent, and the median and mean rank `{medr, meanr}` (docs/method.md, Eq. 59)."""
    values = {f"r{k}": 100.0 * float(np.mean(ranks <= k)) for k in RECALLS}
    return values | {"medr": float(np.median(ranks)), "meanr": float(np.mean(ranks))}


def retrieval_metrics(n_i2t: np.ndarray, n_t2i: np.ndarray, caption_image: np.ndarray) -> dict:
    """Returns `{"i2t": {r1, r5, r10, medr, meanr, map}, "t2i": {...}, "rsum"}`: recalls, map and rsum in percent
    (docs/method.md, Eqs. 58 to 60)."""
    i2t, t2i = best_ranks(n_i2t, n_t2i, caption_image)
    result = {
        "i2t": recalls(i2t) | {"map": 100.0 * float(np.mean(average_precision(n_i2t, caption_image)))},
        # A caption has one relevant image, so its average precision is one over its rank.
        "t2i": recalls(t2i) | {"map": 100.0 * float(np.mean(1.0 / t2i))},
    }
    return result | {"rsum": sum(result[side][f"r{k}"] for side in ("i2t", "t2i") for k in RECALLS)}


def keep_recalls(result: dict) -> dict:
    """Returns a result of `retrieval_metrics` without what needs whole rankings: median and mean rank and average
    precision."""
    known = {f"r{k}" for k in RECALLS}
    return result | {side: {k: x for k, x in result[side].items() if k in known} for side in ("i2t", "t2i")}


def average_metrics(results: list[dict]) -> dict:
    """Returns the mean of several results of `retrieval_metrics`, number by number (the folds of COCO 1K)."""
    first = results[0]
    return {
        key: average_metrics([r[key] for r in results])
        if isinstance(value, dict)
        else float(np.mean([r[key] for r in results]))
        for key, value in first.items()
    }


def chance_recalls(images: int, caption_image: np.ndarray) -> dict:
    """Returns the expected recalls of a random order, in percent: `{"i2t": {r1, r5, r10}, "t2i": {...}}`
    (docs/method.md, Eq. 61)."""
    captions = len(caption_image)
    t2i = {f"r{k}": 100.0 * min(1.0, k / images) for k in RECALLS}
    i2t = {}
    for k in RECALLS:
        miss_probability = np.ones(images)  # that none of an image's captions is among the first k
        for place in range(min(k, captions)):
            miss_probability *= np.clip(captions - np.bincount(caption_image) - place, 0, None) / (captions - place)
        i2t[f"r{k}"] = 100.0 * float(np.mean(1 - miss_probability))
    return {"i2t": i2t, "t2i": t2i}
