"""What is wrong with a model: hubs, collapse, and which captions it fails on. C captions, I images."""

import dataclasses

import numpy as np

from mefn_jax.benchmarks.caption_groups import GROUPINGS
from mefn_jax.benchmarks.hubs import (
    COMMONEST,
    count_occurrences,
    effective_dimensions,
    is_first_commonest,
    mean_cosine,
    skewness,
    skewness_by_chance,
)
from mefn_jax.benchmarks.measures import Measure, combine_measures, compute_intervals, compute_value, mean_measure
from mefn_jax.benchmarks.outcome import Outcome
from mefn_jax.benchmarks.scorer import Scorer
from mefn_jax.data.digests import digest_gallery
from mefn_jax.data.split import Split
from mefn_jax.evaluation.evaluate import TOP, describe_text
from mefn_jax.features import Features
from mefn_jax.metrics import best_ranks
from mefn_jax.scoring.ranking import rank

STRONG_HUBS = 1.4  # skewness of k-occurrence (Feldbauer and Flexer 2019)
COLLAPSED = 0.9  # mean cosine of two different items
RECALLS_OF_GROUPS = (1, 10)
FEWEST_CAPTIONS = 30  # of a group that a sentence compares


@dataclasses.dataclass(frozen=True)
class Answers:
    """Results of all queries of a split.

    Attributes:
        t2i: int64 `(C,)`, the rank of each caption's image.
        first_images, first_captions: the first results of each caption, int64 `(C, k)`, and of each image, `(I, k)`.
        image_vectors, text_vectors: the embeddings, float32 `(I, D)` and `(C, D)`.
    """

    t2i: np.ndarray
    first_images: np.ndarray
    first_captions: np.ndarray
    image_vectors: np.ndarray
    text_vectors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A diagnosis: the measures of groups of captions, numbers by name, and sentences."""

    measures: list[Measure]
    numbers: dict
    sentences: list[str]


def measure_split(scorer: Scorer, split: Split) -> Outcome:
    """Scores a split and returns the diagnosis of the model on it."""
    text = describe_text(scorer.evaluator, split)
    images, texts = scorer.evaluator.encode(scorer.params, split)
    ranking = rank(scorer.scores(images, texts), split.caption_image, top_k=TOP)
    _, t2i = best_ranks(*ranking.counts[1], split.caption_image)
    top = ranking.top_images.positions, ranking.top_captions.positions
    diagnosis = diagnose(split, Answers(t2i, *top, *embed_items(scorer, images, texts)), scorer.evaluator.config)
    sizes = {"images": split.num_images, "captions": split.num_captions}
    return Outcome(
        diagnosis.measures,
        split.num_images,
        "images",
        digest_gallery(split),
        sizes | {"ties": "against the model", "split": split.name} | text,
        diagnosis.sentences,
        diagnosis.numbers,
    )


def embed_items(scorer: Scorer, images: Features, texts: Features) -> tuple[np.ndarray, np.ndarray]:
    """Returns the embeddings of images and of texts, float32 `(I, D)` and `(C, D)`."""
    return tuple(scorer.evaluator.embed(scorer.params, x) for x in (images, texts))


def diagnose(split: Split, answers: Answers, config) -> Diagnosis:
    """Returns the diagnosis of a model with this configuration from its results on a split."""
    measures, numbers = measure_hubs(split, answers), describe_space(split, answers)
    sentences = [*say_hubs(measures, numbers, split, config), say_collapse(numbers)]
    captions, pairs = split.all_captions(), []
    for name, (phrase, group_captions) in GROUPINGS.items():
        groups = measure_groups(split, answers.t2i, name, *group_captions(captions))
        measures += [measure for of_group in groups for measure in of_group]
        large = [recall for recall, *_ in groups if recall.queries >= FEWEST_CAPTIONS]
        pairs += [(large[0], large[-1], phrase)] if len(large) > 1 else []
    return Diagnosis(measures, numbers, sentences + compare_groups(pairs, split.num_images))


def measure_hubs(split: Split, answers: Answers) -> list[Measure]:
    """Returns the shares of captions and of images whose first answer is among the commonest."""
    sides = {
        "captions": (answers.first_images[:, 0], split.num_images, split.caption_image),
        "images": (answers.first_captions[:, 0], split.num_captions, np.arange(split.num_images)),
    }
    return [
        mean_measure(name, "hubs", is_first_commonest(first, size).astype(float), unit, split.num_images)
        for name, (first, size, unit) in sides.items()
    ]


def describe_space(split: Split, answers: Answers) -> dict:
    """Returns numbers about hubs and embeddings: `skewness`, `skewness_by_chance`, `mean_cosine` and
    `effective_dimensions` of images and of captions, and `dimensions`."""
    occurrences = {
        "images": count_occurrences(answers.first_images, split.num_images),
        "captions": count_occurrences(answers.first_captions, split.num_captions),
    }
    sizes = {"images": (split.num_captions, split.num_images), "captions": (split.num_images, split.num_captions)}
    vectors = {"images": answers.image_vectors, "captions": answers.text_vectors}
    return {
        "skewness": {name: skewness(values) for name, values in occurrences.items()},
        "skewness_by_chance": {name: skewness_by_chance(*size, TOP) for name, size in sizes.items()},
        "mean_cosine": {name: mean_cosine(values) for name, values in vectors.items()},
        "effective_dimensions": {name: effective_dimensions(values) for name, values in vectors.items()},
        "dimensions": int(answers.image_vectors.shape[1]),
    }


def measure_groups(
    split: Split, t2i: np.ndarray, name: str, group: np.ndarray, names: list[str]
) -> list[list[Measure]]:
    """Returns the recalls, text to image, of each group of captions, `group (C,)`."""
    result = []
    for k, group_name in enumerate(names):
        chosen = np.flatnonzero(group == k)
        result.append(
            [
                mean_measure(
                    f"{name}: {group_name}",
                    f"r{number}",
                    (t2i[chosen] <= number).astype(float),
                    split.caption_image[chosen],
                    split.num_images,
                    100 * min(1.0, number / split.num_images),
                )
                for number in RECALLS_OF_GROUPS
            ]
        )
    return result


def say_hubs(measures: list[Measure], numbers: dict, split: Split, config) -> list[str]:
    """Returns sentences about hubs, and what can be done about strong ones."""
    shares = [compute_value(measure, split.num_images) for measure in measures]
    captions = np.sort(np.diff(split.caption_offsets))[::-1]
    ideal = 100 * captions[:COMMONEST].sum() / split.num_captions
    skew, by_chance = numbers["skewness"], numbers["skewness_by_chance"]
    strong = max(skew.values()) > STRONG_HUBS
    commonest = (
        f"Hubs: the {COMMONEST} images that come first most often answer {shares[0]:.1f} % of the captions "
        f"({ideal:.1f} % if every caption found its own), and the {COMMONEST} commonest captions {shares[1]:.1f} % of "
        "the images."
    )
    shape = (
        f"The skewness of {TOP}-occurrence is {skew['images']:.1f} for images and {skew['captions']:.1f} for captions "
        f"({by_chance['images']:.1f} and {by_chance['captions']:.1f} in a random order): "
        f"{'strong' if strong else 'no strong'} hubness, which begins at {STRONG_HUBS}."
    )
    sentences = [commonest, shape]
    if strong and "matcher" in config and not config.matcher.get("hub_vectors", 1):
        sentences.append(
            "A learned hubness correction (--config.matcher.hub_vectors=1024 in training) lowers the scores of hubs; "
            "eval.py --transductive=csls shows how much is to be won."
        )
    return sentences


def say_collapse(numbers: dict) -> str:
    """Returns a sentence about collapse."""
    cosine, used = numbers["mean_cosine"], numbers["effective_dimensions"]
    collapsed = [name for name, value in cosine.items() if value > COLLAPSED]
    verdict = f"the embeddings of {' and '.join(collapsed)} have collapsed" if collapsed else "no collapse"
    return (
        f"Collapse: {verdict}; two images have a mean cosine of {cosine['images']:.2f}, two captions of "
        f"{cosine['captions']:.2f}, and they use {used['images']:.1f} and {used['captions']:.1f} of "
        f"{numbers['dimensions']} dimensions."
    )


def compare_groups(pairs: list[tuple[Measure, Measure, str]], units: int) -> list[str]:
    """Returns a sentence for each pair of groups of captions, of which `(recall, recall, phrase)` are given."""
    if not pairs:
        return []
    differences = []
    for first, last, _ in pairs:
        negative = dataclasses.replace(last, arrays=last.arrays | {"factors": -last.arrays["factors"]})
        differences.append(combine_measures("", "", [first, negative], 1.0))
    intervals = compute_intervals(differences, units)
    return [say_difference(*pair, units, interval) for pair, interval in zip(pairs, intervals, strict=True)]


def say_difference(first: Measure, last: Measure, phrase: str, units: int, interval: tuple[float, float]) -> str:
    """Returns a sentence that compares the recalls of two groups of captions, with the interval of the difference."""
    names, values = zip(*((m.row.partition(": ")[2], compute_value(m, units)) for m in (first, last)), strict=True)
    low, high = interval
    one, other = (phrase.format(name) for name in names)
    numbers = f"R@1 {values[0]:.1f} against {values[1]:.1f}, difference [{low:+.1f}, {high:+.1f}]"
    if low <= 0 <= high:
        return f"Captions {one} and captions {other} find their image first about equally often: {numbers}."
    return (
        f"Captions {one} find their image first {'less' if high < 0 else 'more'} often than those {other}: {numbers}."
    )
