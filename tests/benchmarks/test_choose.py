"""Compositional cases against loops: ties, a constant scorer, same words, and random scores near chance."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.benchmarks.items import Cases, Choice, Pairing
from mefn_jax.benchmarks.measures import compute_value
from mefn_jax.benchmarks.tasks import choose
from mefn_jax.data.split import Split

CAPTIONS = ["a red dog", "a dog red", "a blue cat", "two dogs", "Dog, a red!"]
IMAGES = Split("images", None, np.arange(4), np.zeros(5, int))
CHOICES = [
    Choice(0, (0,), (1,), "order"),
    Choice(1, (2, 3), (0,), "objects"),
    Choice(0, (4,), (0, 1), "order"),
    Choice(2, (3,), (2,), "objects"),
]
PAIRINGS = [Pairing((0, 1), (0, 1), "a"), Pairing((2, 3), (2, 3), "b"), Pairing((0, 1), (4, 2), "b")]


def values_of(cases, table):
    scores = {(i, c): float(table[i, c]) for i in range(4) for c in range(5)}
    measures = choose.judge_cases(Cases(IMAGES, CAPTIONS, cases), scores)
    units = int(choose.case_units(cases).max()) + 1
    return {m.name: compute_value(m, units) for m in measures}, {m.name: m.chance for m in measures}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31))
def test_accuracies_equal_loops_over_tied_scores(seed):
    table = np.random.default_rng(seed).integers(0, 3, (4, 5))
    success = [all(table[c.image, t] > table[c.image, f] for t in c.true for f in c.false) for c in CHOICES]
    values, _ = values_of(CHOICES, table)
    assert values["order.accuracy"] == pytest.approx(100 * np.mean([success[0], success[2]]))
    assert values["objects.accuracy"] == pytest.approx(100 * np.mean([success[1], success[3]]))
    assert values["all.accuracy"] == pytest.approx(100 * np.mean(success))
    assert values["mean.accuracy"] == pytest.approx((values["order.accuracy"] + values["objects.accuracy"]) / 2)
    assert values["same words.accuracy"] == values["order.accuracy"]
    judged = []
    for case in PAIRINGS:
        (i, j), (a, b) = case.images, case.captions
        text = table[i, a] > table[i, b] and table[j, b] > table[j, a]
        image = table[i, a] > table[j, a] and table[j, b] > table[i, b]
        judged.append((text, image, text and image))
    values, _ = values_of(PAIRINGS, table)
    assert [values[f"all.{kind}"] for kind in ("text", "image", "group")] == pytest.approx(
        (100 * np.mean(judged, 0)).tolist()
    )
    assert values["same words.group"] == pytest.approx(100.0 * judged[0][2])


def test_chance_is_that_of_all_orders_of_different_scores():
    for case in (Choice(0, (0,), (1,), ""), Choice(0, (0, 1), (2, 3), ""), Pairing((0, 1), (0, 1), "")):
        pairs = choose.list_pairs([case]).tolist()
        judged = [
            choose.judge_case(case, dict(zip(map(tuple, pairs), order, strict=True)))
            for order in itertools.permutations(range(len(pairs)))
        ]
        for kind, (_, chance) in judged[0].items():
            assert 100 * np.mean([of_order[kind][0] for of_order in judged]) == pytest.approx(chance), (case, kind)


@pytest.mark.parametrize("cases", [CHOICES, PAIRINGS])
def test_constant_scores_never_succeed(cases):
    values, _ = values_of(cases, np.ones((4, 5)))
    assert not any(values.values())


def test_a_case_is_resampled_with_its_image():
    assert choose.case_units(CHOICES).tolist() == [0, 1, 0, 2]
    assert choose.case_units(PAIRINGS).tolist() == [0, 1, 0]
