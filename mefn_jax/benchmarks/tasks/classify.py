"""Zero-shot classification: the class whose prompt scores highest with an image. I images, K classes, T templates.

The score of a class is the mean over the templates of the scores of its prompts, whatever the matcher. For a cosine it
is the product with the mean of the prompts' embeddings, where CLIP's authors also divide by the length of that mean.
"""

import json

import numpy as np

from mefn_jax.benchmarks.items import ClassFolder, list_image_names
from mefn_jax.benchmarks.measures import Measure, mean_measure
from mefn_jax.benchmarks.outcome import Outcome
from mefn_jax.benchmarks.scorer import Scorer
from mefn_jax.data.digests import digest_text
from mefn_jax.scoring.ranking import check_finite
from mefn_jax.scoring.tiles import TILE_CAPTIONS, TILE_IMAGES, Scores, even_slices

TOP_CLASSES = (1, 5)  # top-1, top-5


def measure_classes(scorer: Scorer, classes: ClassFolder) -> Outcome:
    """Scores a model on zero-shot classification: top-1 and top-5, and the mean over classes of the top-1. Raises
    ConfigError if the model cannot take the images or captions, and TrainingError for a score that is not finite."""
    images = scorer.encode_images(classes.images)
    prompts = [template.replace("{}", name) for name in classes.names for template in classes.templates]
    text = scorer.describe_captions(prompts, "the prompts")
    scores = scorer.scores(images, scorer.encode_captions(prompts))
    of_classes = score_classes(scores, len(classes.label), len(classes.names), len(classes.templates))  # (I, K)
    measures = measure_ranks(rank_labels(of_classes, classes.label), classes.label, len(classes.names))
    sizes = {"images": len(classes.label), "classes": len(classes.names), "templates": len(classes.templates)}
    notes = note_short_prompts(prompts)
    protocol = sizes | {"ties": "against the model"} | text
    return Outcome(measures, sizes["images"], "images", digest_classes(classes), protocol, notes)


def score_classes(scores: Scores, images: int, classes: int, templates: int) -> np.ndarray:
    """Returns the scores of all images with all classes, float64 `(I, K)`: the means over the templates, whose prompts
    stand side by side. Raises TrainingError for a score that is not finite."""
    at_once = max(1, TILE_CAPTIONS // templates)
    blocks = [slice(part.start * templates, part.stop * templates) for part in even_slices(classes, at_once)]
    rows = [
        np.concatenate([check_finite(scores(part, block), part, block).astype(float) for block in blocks], 1)
        for part in even_slices(images, TILE_IMAGES)
    ]
    return np.concatenate(rows).reshape(images, classes, templates).mean(2)


def rank_labels(scores: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Returns the rank, from 1, of each image's own class among all by their scores `(I, K)`; a tie counts against the
    model."""
    own = np.take_along_axis(scores, label[:, None], 1)
    return np.sum(scores >= own, 1)


def measure_ranks(ranks: np.ndarray, label: np.ndarray, classes: int) -> list[Measure]:
    """Returns the measures of the ranks `(I,)` of the images' own classes."""
    unit, images = np.arange(len(ranks)), len(ranks)
    measures = [
        mean_measure("all", f"top{k}", (ranks <= k).astype(float), unit, images, 100 * k / classes)
        for k in TOP_CLASSES
        if k < classes
    ]
    arrays = {"values": 100.0 * (ranks <= 1), "group": label}
    return [*measures, Measure("all", "per_class", "group_mean", arrays, images, 100 / classes)]


def note_short_prompts(prompts: list[str]) -> list[str]:
    """Returns a note if prompts are a single word: scores of captions of other lengths are not on one scale."""
    short = sum(len(prompt.split()) == 1 for prompt in prompts)
    text = (
        f"note: {short} of {len(prompts)} prompts are a single word. A score may depend on the number of words, and "
        "classes with long names then win or lose by it; use templates of several words"
    )
    return [text] if short else []


def digest_classes(classes: ClassFolder) -> str:
    """Returns the digest of the images' names, their classes and the prompts."""
    names = [list_image_names(classes.images), classes.label.tolist(), classes.names, classes.templates]
    return digest_text(json.dumps(names))
