"""What a shortlist loses and saves: two-stage retrieval beside scoring all pairs (`eval.py --rerank`)."""

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
    """How many of the images `--rerank` asks for: below 1 it is a share of them, from 1 on a number; 0 where it does
    not ask. Raises ConfigError."""
    if not text:
        return 0
    try:
        asked = float(text)
    except ValueError:
        asked = 0.0
    if not 0 < asked <= images:
        raise ConfigError(
            f"--rerank={text}: give a share of the gallery as 0.1, or how many of its {images} images, as 100"
        )
    return round(asked) if asked >= 1 else max(1, round(asked * images))


def compare_reranking(
    evaluator: Evaluator, params, images: Features, texts: Features, split: Split, k: int, whole: dict
) -> dict:
    """Ranks a split by shortlists of k images and by the coarse vectors alone, beside `whole`, the report of ranking it
    by all scores, with the `seconds` that these took. Returns `{"reranked", "exhaustive", "embedding"}`, each of
    `metrics.summarise` with `seconds` (without compilation; of the shortlists the median of three times); `images`, k;
    `share`, of all images; and in percent, how many captions have their own image in their list, `listed`, or would
    have it among the k nearest to them alone, `nearest`."""
    owner, times = split.caption_image, []
    for _ in range(4):
        start = time.perf_counter()
        found = evaluator.rerank(params, images, texts, k)
        counts = rerank.rank_counts(found, owner)
        times.append(time.perf_counter() - start)
    short = float(np.median(times[1:]))  # the first time all that is compiled is
    of_images, of_texts = (evaluator.embed(params, x) for x in (images, texts))
    ranking = rank(lambda rows, columns: of_images[rows] @ of_texts[columns].T, owner)
    embedding = metrics.retrieval_metrics(*ranking.counts[1], owner) | {"seconds": ranking.seconds}
    return {
        "images": k,
        "share": k / split.num_images,
        "listed": 100.0 * float(np.mean(np.any(found.images == owner[:, None], 1))),
        "nearest": 100.0 * float(np.mean(ranking.counts[1][1] < k)),
        "reranked": metrics.retrieval_metrics(*counts, owner) | {"seconds": short},
        "exhaustive": {key: whole[key] for key in embedding},
        "embedding": embedding,
    }


def print_reranking(result: dict) -> None:
    """Prints what is lost and what is saved."""
    print0(
        f"\nshortlists: {result['images']} images for each caption, {100 * result['share']:.1f} % of all pairs: those "
        "nearest to it or to captions like it; an image is ranked against the captions that list it\n"
        f"the list has the own image of {result['listed']:.1f} % of the captions (one of those nearest to it alone "
        f"would have that of {result['nearest']:.1f} %)"
    )
    titles = "".join(f"{f'{side} R@1':>8} {'R@5':>7} {'R@10':>7} " for side in ("i2t", "t2i"))
    print0(f"{'':12} {titles}{'rSum':>7} {'seconds':>8}")
    for name in ("exhaustive", "reranked", "embedding"):
        r = result[name]
        cells = [r[side][k] for side in ("i2t", "t2i") for k in ("r1", "r5", "r10")]
        numbers = "".join(f"{x:{8 if n % 3 == 0 else 7}.1f} " for n, x in enumerate(cells))
        print0(f"{name:12} {numbers}{r['rsum']:7.1f} {r['seconds']:8.2f}")
    lost = {side: result["reranked"][side]["r1"] - result["exhaustive"][side]["r1"] for side in ("i2t", "t2i")}
    ratio = result["reranked"]["seconds"] / result["exhaustive"]["seconds"]
    print0(f"R@1 changes by {lost['i2t']:+.1f} and {lost['t2i']:+.1f} in {100 * ratio:.0f} % of the time")
