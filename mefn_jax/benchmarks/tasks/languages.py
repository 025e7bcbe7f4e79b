"""Retrieval in several languages: recall for the same images with the captions of each language, and the mean."""

import json

import jax
import numpy as np

from mefn_jax import metrics
from mefn_jax.benchmarks.items import LanguageTable, list_image_names
from mefn_jax.benchmarks.measures import Measure, combine_measures, mean_measure
from mefn_jax.benchmarks.outcome import Outcome
from mefn_jax.benchmarks.scorer import Scorer
from mefn_jax.data.digests import digest_text
from mefn_jax.features import Features
from mefn_jax.runtime.console import print0
from mefn_jax.scoring.ranking import rank

DIRECTIONS_SCORED = ("i2t", "t2i")


def measure_languages(scorer: Scorer, table: LanguageTable) -> Outcome:
    """Scores every language: R@1 and R@10 in both directions and rSum; the last row is the mean of the languages.

    Images without a caption in a language are left out of its gallery. Raises ConfigError if the model cannot take the
    images or captions, and TrainingError for a score that is not finite.
    """
    images = scorer.encode_images(table.images)
    measures, unknown = [], {}
    for code, (captions, caption_image) in table.languages.items():
        text = scorer.describe_captions(captions, f"the captions in {code}")
        unknown[code] = {key: text[key] for key in ("unknown_wordpieces", "cut_captions")}
        measures += measure_language(scorer, code, images, scorer.encode_captions(captions), caption_image)
    measures = add_means(measures)
    sizes = {
        "languages": len(table.languages),
        "images": table.images.num_images,
        "captions": sum(len(captions) for captions, _ in table.languages.values()),
    }
    numbers = {"reading": unknown}
    protocol = sizes | {"ties": "against the model"}
    return Outcome(measures, sizes["images"], "images", digest_table(table), protocol, numbers=numbers)


def measure_language(
    scorer: Scorer, code: str, images: Features, captions: Features, caption_image: np.ndarray
) -> list[Measure]:
    """Returns the measures of one language, whose captions are of the images `caption_image (C,)`."""
    present, own = np.unique(caption_image, return_inverse=True)
    gallery = jax.tree.map(lambda x: x[present], images)
    ranking = rank(scorer.scores(gallery, captions), own)
    ranks = metrics.best_ranks(*ranking.counts[1], own)
    chance, recalls = metrics.chance_recalls(len(present), own), []
    if len(present) < len(images.mask):
        missing = len(images.mask) - len(present)
        print0(f"note: left out of the gallery in {code}, because they have no caption in it: {missing} of the images")
    for side, of_side, unit in zip(DIRECTIONS_SCORED, ranks, (present, caption_image), strict=True):
        for k in metrics.RECALLS:
            values, key = (of_side <= k).astype(float), f"r{k}"
            recalls.append(mean_measure(code, f"{side}.{key}", values, unit, len(images.mask), chance[side][key]))
    queries = len(present) + len(caption_image)
    rsum = combine_measures(code, "rsum", recalls, 1.0, sum(part.chance for part in recalls), queries)
    return [part for part in recalls if not part.column.endswith("r5")] + [rsum]


def add_means(measures: list[Measure]) -> list[Measure]:
    """Returns the measures of the languages, followed by their means."""
    columns, languages = (list(dict.fromkeys(getattr(m, key) for m in measures)) for key in ("column", "row"))
    means = []
    for column in columns if len(languages) > 1 else []:
        parts = [m for m in measures if m.column == column]
        chance = float(np.mean([part.chance for part in parts]))
        means.append(combine_measures("mean", column, parts, 1 / len(parts), chance))
    return measures + means


def digest_table(table: LanguageTable) -> str:
    """Returns the digest of the images' names and of the captions of every language."""
    names = list_image_names(table.images)
    languages = {code: [captions, image.tolist()] for code, (captions, image) in table.languages.items()}
    return digest_text(json.dumps([names, languages]))
