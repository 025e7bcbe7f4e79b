"""Human judgements: Kendall's tau of a model's scores with single judgements of pairs, times 100.

This is how CLIPScore's authors count (Hessel et al. 2021).
"""

import json

from mefn_jax.benchmarks.items import RatedPairs, list_image_names
from mefn_jax.benchmarks.measures import Measure
from mefn_jax.benchmarks.outcome import Outcome
from mefn_jax.benchmarks.scorer import Scorer
from mefn_jax.data.digests import digest_text
from mefn_jax.scoring.listed import score_listed_pairs


def measure_judgements(scorer: Scorer, pairs: RatedPairs) -> Outcome:
    """Scores rated pairs: tau-b and tau-c over all single judgements. Raises ConfigError if the model cannot take the
    images or captions, and TrainingError for a score that is not finite."""
    images = scorer.encode_images(pairs.images)
    text = scorer.describe_captions(pairs.captions, "the captions")
    scores = scorer.scores(images, scorer.encode_captions(pairs.captions))
    measures = correlate(score_listed_pairs(scores, pairs.image, pairs.caption), pairs)
    sizes = {"judgements": int(pairs.ratings.size), "pairs": len(pairs.image), "images": pairs.images.num_images}
    notes = [f"left out because the caption is the image's own: {pairs.skipped} of the pairs"] if pairs.skipped else []
    return Outcome(measures, pairs.images.num_images, "images", digest_pairs(pairs), sizes | text, notes)


def correlate(scores, pairs: RatedPairs) -> list[Measure]:
    """Returns tau-b and tau-c of the scores `(P,)` of pairs with their judgements."""
    arrays = {"scores": scores, "ratings": pairs.ratings, "unit": pairs.image, "factor": 100.0}
    return [Measure("all", name, name, arrays, int(pairs.ratings.size), 0.0) for name in ("tau_b", "tau_c")]


def digest_pairs(pairs: RatedPairs) -> str:
    """Returns the digest of the images' names, the captions, the pairs and their judgements."""
    names = list_image_names(pairs.images)
    arrays = [x.tolist() for x in (pairs.image, pairs.caption, pairs.ratings)]
    return digest_text(json.dumps([names, pairs.captions, *arrays]))
