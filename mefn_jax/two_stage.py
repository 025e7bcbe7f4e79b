"""What a shortlist loses and saves: two-stage retrieval beside scoring all pairs (`eval.py --shortlist`)."""

import time

import numpy as np

from mefn_jax import metrics, shortlist
from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError
from mefn_jax.evaluator import Evaluator
from mefn_jax.logs import say
from mefn_jax.matching.features import Features
from mefn_jax.ranking import rank


def share_of(text: str, split: Split) -> float:
    """The share of the images, for each caption, that `--shortlist` asks for: below 1 a share, from 1 on a number of
    images; 0 where it does not ask. Raises ConfigError."""
    if not text:
        return 0.0
    try:
        asked = float(text)
    except ValueError:
        asked = 0.0
    if not 0 < asked <= split.images:
        raise ConfigError(f"--shortlist={text}: give a share of the gallery as 0.1, or how many images, as 100")
    return asked if asked < 1 else asked / split.images


def two_stages(
    evaluator: Evaluator, params, images: Features, texts: Features, split: Split, share: float, whole: dict
) -> dict:
    """Ranks a split by its shortlists and by the coarse vectors alone, beside `whole`, the report of ranking it by all
    scores, with the `seconds` that these took. Returns `{"shortlist", "exhaustive", "coarse"}`, each of
    `metrics.summarise` with `seconds` (without compilation; of the shortlists the median of three times), and
    `share`."""
    owner, times = split.caption_image, []
    for _ in range(4):
        start = time.perf_counter()
        counts = shortlist.counts(evaluator.shortlists(params, images, texts, share), owner)
        times.append(time.perf_counter() - start)
    short = float(np.median(times[1:]))  # the first time all that is compiled is
    of_images, of_texts = (evaluator.coarse(params, x) for x in (images, texts))
    ranking = rank(lambda rows, columns: of_images[rows] @ of_texts[columns].T, owner)
    coarse = metrics.summarise(*ranking.counts[1], owner) | {"seconds": ranking.seconds}
    return {
        "share": share,
        "shortlist": metrics.summarise(*counts, owner) | {"seconds": short},
        "exhaustive": {key: whole[key] for key in coarse},
        "coarse": coarse,
    }


def show(result: dict, split: Split) -> None:
    """Prints what is lost and what is saved."""
    images = max(1, round(result["share"] * split.images))
    say(
        f"\nshortlists: {images} images for each caption, {100 * result['share']:.1f} % of all pairs: those nearest to "
        "it or to captions like it; an image is ranked against the captions that list it"
    )
    titles = "".join(f"{f'{side} R@1':>8} {'R@5':>7} {'R@10':>7} " for side in ("i2t", "t2i"))
    say(f"{'':12} {titles}{'rSum':>7} {'seconds':>8}")
    for name in ("exhaustive", "shortlist", "coarse"):
        r = result[name]
        cells = [r[side][k] for side in ("i2t", "t2i") for k in ("r1", "r5", "r10")]
        numbers = "".join(f"{x:{8 if n % 3 == 0 else 7}.1f} " for n, x in enumerate(cells))
        say(f"{name:12} {numbers}{r['rsum']:7.1f} {r['seconds']:8.2f}")
    lost = {side: result["shortlist"][side]["r1"] - result["exhaustive"][side]["r1"] for side in ("i2t", "t2i")}
    ratio = result["shortlist"]["seconds"] / result["exhaustive"]["seconds"]
    say(f"R@1 changes by {lost['i2t']:+.1f} and {lost['t2i']:+.1f} in {100 * ratio:.0f} % of the time")
