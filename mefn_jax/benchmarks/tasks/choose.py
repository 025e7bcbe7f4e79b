"""Compositional benchmarks: does a model score what is true above what is nearly the same, and untrue?

A tie is never a success. Cases whose captions are the same bag of words are also counted apart: no model that takes a
caption for a bag of words can succeed in them.
"""

import collections
import json
import math
import re

import numpy as np

from mefn_jax.benchmarks.items import (
    ALL_CASES,
    MEAN_OF_SUBSETS,
    SAME_WORDS,
    Cases,
    Choice,
    Pairing,
    list_image_names,
)
from mefn_jax.benchmarks.measures import Measure, combine_measures, mean_measure
from mefn_jax.benchmarks.outcome import Outcome
from mefn_jax.benchmarks.scorer import Scorer
from mefn_jax.data.digests import digest_text
from mefn_jax.scoring.listed import score_listed_pairs

# Successes of a pairing, and their chance: with scores in a random order, 2 of 8, 2 of 8, and 4 of 24.
PAIRING_CHANCE = {"text": 25.0, "image": 25.0, "group": 100 / 6}


def measure_cases(scorer: Scorer, cases: Cases) -> Outcome:
    """Scores a model on a compositional benchmark: accuracy by subset, in percent. Raises ConfigError if the model
    cannot take its images or captions."""
    images = scorer.encode_images(cases.images)
    text = scorer.describe_captions(cases.captions, "the captions")
    scores = scorer.scores(images, scorer.encode_captions(cases.captions))
    pairs = list_pairs(cases.cases)
    lookup = dict(zip(map(tuple, pairs.tolist()), score_listed_pairs(scores, *pairs.T).tolist(), strict=True))
    measures, unit = judge_cases(cases, lookup), "images" if isinstance(cases.cases[0], Choice) else "pairs of images"
    units = int(case_units(cases.cases).max()) + 1
    sizes = {"cases": len(cases.cases), "images": cases.images.num_images, "captions": len(cases.captions)}
    return Outcome(measures, units, unit, digest_cases(cases), sizes | {"ties": "never a success"} | text)


def list_pairs(cases: list[Choice] | list[Pairing]) -> np.ndarray:
    """Returns the pairs (image, caption) that cases need, each once, int64 `(P, 2)`."""
    pairs = set()
    for case in cases:
        if isinstance(case, Choice):
            pairs |= {(case.image, caption) for caption in case.true + case.false}
        else:
            pairs |= {(image, caption) for image in case.images for caption in case.captions}
    return np.array(sorted(pairs))


def judge_cases(cases: Cases, scores: dict[tuple[int, int], float]) -> list[Measure]:
    """Returns the measures of cases, given the score of each pair (image, caption)."""
    judged = [judge_case(case, scores) for case in cases.cases]
    unit, columns = case_units(cases.cases), list(judged[0])
    subsets, same_words = np.array([case.subset for case in cases.cases]), find_same_words(cases)
    rows = {name: subsets == name for name in dict.fromkeys(subsets.tolist())}
    extra = {ALL_CASES: np.ones(len(subsets), bool)} | ({SAME_WORDS: same_words} if same_words.any() else {})
    measures = []
    for column in columns:
        values, chances = (np.array([case[column][k] for case in judged]) for k in (0, 1))

        def measure(row, chosen, column=column, values=values, chances=chances):
            chance = float(chances[chosen].mean())
            return mean_measure(row, column, values[chosen], unit[chosen], int(unit.max()) + 1, chance)

        of_subsets = [measure(row, chosen) for row, chosen in rows.items() if len(rows) > 1]
        measures += of_subsets
        if of_subsets:
            chance = float(np.mean([part.chance for part in of_subsets]))
            measures.append(combine_measures(MEAN_OF_SUBSETS, column, of_subsets, 1 / len(of_subsets), chance))
        measures += [measure(row, chosen) for row, chosen in extra.items()]
    return measures


def judge_case(case: Choice | Pairing, scores: dict[tuple[int, int], float]) -> dict[str, tuple[bool, float]]:
    """Returns, for each kind of success, whether the scores succeed in a case, and its chance in percent."""
    if isinstance(case, Choice):
        true, false = ([scores[case.image, caption] for caption in side] for side in (case.true, case.false))
        chance = 100 / math.comb(len(true) + len(false), len(true))
        return {"accuracy": (min(true) > max(false), chance)}
    own = [scores[image, caption] for image, caption in zip(case.images, case.captions, strict=True)]
    other = [scores[image, caption] for image, caption in zip(case.images, case.captions[::-1], strict=True)]
    # `other[k]` is image k with the other caption.
    text = own[0] > other[0] and own[1] > other[1]
    image = own[0] > other[1] and own[1] > other[0]
    success = {"text": text, "image": image, "group": text and image}
    return {kind: (success[kind], chance) for kind, chance in PAIRING_CHANCE.items()}


def case_units(cases: list[Choice] | list[Pairing]) -> np.ndarray:
    """Returns the unit that is resampled with each case, int64 `(cases,)`: its image, or its pair of images."""
    keys = [case.image if isinstance(case, Choice) else case.images for case in cases]
    positions = {key: k for k, key in enumerate(dict.fromkeys(keys))}
    return np.array([positions[key] for key in keys])


def find_same_words(cases: Cases) -> np.ndarray:
    """Returns which cases have captions that are all the same bag of words, but for case and punctuation, bool
    `(cases,)`."""
    bags = [collections.Counter(re.findall(r"\w+", caption.lower())) for caption in cases.captions]
    captions = [case.true + case.false if isinstance(case, Choice) else case.captions for case in cases.cases]
    return np.array([all(bags[k] == bags[of_case[0]] for k in of_case) for of_case in captions])


def digest_cases(cases: Cases) -> str:
    """Returns the digest of the images' names, the captions and the cases."""
    parts = [list_image_names(cases.images), cases.captions, [list(vars(case).values()) for case in cases.cases]]
    return digest_text(json.dumps(parts))
