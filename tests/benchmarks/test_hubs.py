"""Hubs, collapse and groups of captions against loops and SciPy."""

import numpy as np
import pytest
from scipy import stats

from mefn_jax.benchmarks import caption_groups, hubs


def test_skewness_equals_scipy_and_is_zero_for_equal_values():
    values = np.random.default_rng(0).poisson(3, 200)
    assert hubs.skewness(values) == pytest.approx(stats.skew(values))
    assert hubs.skewness(np.ones(5)) == 0.0
    assert hubs.skewness_by_chance(500, 40, 10) == pytest.approx(float(stats.binom(500, 0.25).stats("s")))


def test_occurrences_and_commonest_answers_equal_loops():
    rng = np.random.default_rng(1)
    top = np.stack([rng.permutation(30)[:4] for _ in range(50)])
    top[:, 0] = rng.integers(0, 30, 50) ** 2 // 30
    top[3, 2:] = -1
    counts = hubs.count_occurrences(top, 30)
    assert counts.tolist() == [int(np.sum(top == k)) for k in range(30)]
    first = top[:, 0].tolist()
    commonest = sorted(range(30), key=lambda k: (-first.count(k), k))[: hubs.COMMONEST]
    assert hubs.is_first_commonest(top[:, 0], 30).tolist() == [k in commonest for k in first]


def test_collapse_is_seen_in_cosines_and_dimensions():
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(300, 8))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = units @ units.T
    assert hubs.mean_cosine(vectors) == pytest.approx(cosines[~np.eye(300, dtype=bool)].mean())
    assert hubs.effective_dimensions(vectors) == pytest.approx(8, rel=0.1)
    alike = np.tile(vectors[:1], (5, 1)).astype(np.float32)
    assert hubs.mean_cosine(alike) == pytest.approx(1.0, abs=1e-6)
    assert hubs.effective_dimensions(alike) == 0.0


@pytest.mark.parametrize(
    ("caption", "things"),
    [
        ("a red circle to the left of a blue square", 2),
        ("a picture of two crosses and a small disc", 2),
        ("A man in his car waves at the three dogs", 3),
        ("running", 1),
    ],
)
def test_count_things_counts_articles_numbers_and_possessives(caption, things):
    assert caption_groups.count_things(caption) == things


def test_groups_hold_every_caption_once():
    captions = ["a dog", "a red dog", "two dogs left of a car and a man", "water", "a cat on the top of a box"]
    for _, group_captions in caption_groups.GROUPINGS.values():
        group, names = group_captions(captions)
        assert sorted(set(group.tolist())) == list(range(len(names)))
        assert len(group) == len(captions)
    group, names = caption_groups.GROUPINGS["relation words"][1](captions)
    assert [names[k] for k in group] == ["without", "without", "with", "without", "with"]
