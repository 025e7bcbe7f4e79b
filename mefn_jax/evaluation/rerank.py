"""Compares reranking with scoring all pairs: what candidates cost in recall and save in time (`eval.py --rerank`)."""

import re
import time

import numpy as np

from mefn_jax import metrics
from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.features import Features
from mefn_jax.runtime.console import print0
from mefn_jax.scoring import rerank
from mefn_jax.scoring.ranking import rank


def parse_rerank(text: str, images: int) -> int:
    """Returns the number of candidates that `--rerank` asks for in a gallery of `images`; 0 if it is empty.

    A value below 1 is a share of the gallery, a whole number from 1 on a number of images. Raises ConfigError.
    """
    if not text:
        return 0
    try:
        value = float(text) if re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", text) else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value <= images or (value > 1 and value % 1):
        raise ConfigError(
            f"--rerank={text}: give a share of the gallery, such as 0.1, or a number of its {images} images, "
            "such as 100"
        )
    return int(value) if value >= 1 else max(1, round(value * images))


def compare_reranking(
    evaluator: Evaluator, params, images: Features, texts: Features, split: Split, k: int, whole: dict
) -> dict:
    """Compares three rankings of a split: exhaustive, reranked, and by the embeddings alone.

    `whole` is the report of the exhaustive ranking with its `seconds`; the reranked one has k candidates for each
    caption (docs/method.md, Eqs. 64, 65). Returns a dict:
        exhaustive, reranked, embedding: `metrics.retrieval_metrics` with `seconds`. Those of reranking are the median
            of three times, without compilation.
        images, share: k, and k as a share of all images.
        listed: percentage of captions that have their own image among their candidates.
        nearest: percentage of captions that have it among the k images nearest to this caption alone.
    """
    caption_image, times = split.caption_image, []
    for _ in range(4):
        start = time.perf_counter()
        candidates = evaluator.rerank(params, images, texts, k)
        counts = rerank.rank_counts(candidates, caption_image)
        times.append(time.perf_counter() - start)
    seconds = float(np.median(times[1:]))  # the first time includes compilation
    image_embeddings = evaluator.image_vectors(params, images)
    text_embeddings = evaluator.text_vectors(params, texts)
    ranking = rank(lambda rows, columns: image_embeddings[rows] @ text_embeddings[columns].T, caption_image)
    embedding = metrics.retrieval_metrics(*ranking.counts[1], caption_image) | {"seconds": ranking.seconds}
    return {
        "images": k,
        "share": k / split.num_images,
        "listed": 100.0 * float(np.mean(np.any(candidates.images == caption_image[:, None], 1))),
        "nearest": 100.0 * float(np.mean(ranking.counts[1][1] < k)),
        "reranked": metrics.retrieval_metrics(*counts, caption_image) | {"seconds": seconds},
        "exhaustive": {key: whole[key] for key in embedding},
        "embedding": embedding,
    }


def print_reranking(result: dict) -> None:
    """Prints the result of `compare_reranking`: recall and time of the three rankings."""
    print0(
        f"\nreranking: {result['images']} images for each caption, {100 * result['share']:.1f} % of all pairs: the "
        "candidates, nearest to the caption or to captions like it; an image is ranked against the captions that it is "
        "a candidate for\n"
        f"{result['listed']:.1f} % of the captions have their own image among their candidates "
        f"({result['nearest']:.1f} % would if candidates were nearest to this caption alone)"
    )
    titles = "".join(f"{f'{side} R@1':>8} {'R@5':>7} {'R@10':>7} " for side in ("i2t", "t2i"))
    print0(f"{'':12} {titles}{'rSum':>7} {'seconds':>8}")
    for name in ("exhaustive", "reranked", "embedding"):
        r = result[name]
        cells = [r[side][k] for side in ("i2t", "t2i") for k in ("r1", "r5", "r10")]
        numbers = "".join(f"{x:{8 if n % 3 == 0 else 7}.1f} " for n, x in enumerate(cells))
        print0(f"{name:12} {numbers}{r['rsum']:7.1f} {r['seconds']:8.2f}")
    change = {side: result["reranked"][side]["r1"] - result["exhaustive"][side]["r1"] for side in ("i2t", "t2i")}
    ratio = result["reranked"]["seconds"] / result["exhaustive"]["seconds"]
    print0(
        f"reranking changes R@1 by {change['i2t']:+.1f} (i2t) and {change['t2i']:+.1f} (t2i) and takes "
        f"{100 * ratio:.0f} % of the time"
    )
