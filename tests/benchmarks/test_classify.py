"""Zero-shot classification against loops: templates, ties, mean per class."""

import numpy as np
import pytest

from mefn_jax.benchmarks.measures import compute_value
from mefn_jax.benchmarks.tasks import classify
from mefn_jax.errors import TrainingError

LABEL = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 6])
CLASSES, TEMPLATES = 7, 3


@pytest.mark.parametrize("values", [10**6, 3])
def test_measures_of_classes_equal_loops(values, monkeypatch):
    monkeypatch.setattr(classify, "TILE_CAPTIONS", 7)
    monkeypatch.setattr(classify, "TILE_IMAGES", 4)
    table = np.random.default_rng(0).integers(0, values, (10, CLASSES * TEMPLATES)).astype(float)
    scores = classify.score_classes(lambda rows, columns: table[rows, columns], 10, CLASSES, TEMPLATES)
    expected = [[np.mean(row[k * TEMPLATES : (k + 1) * TEMPLATES]) for k in range(CLASSES)] for row in table]
    np.testing.assert_allclose(scores, expected)
    ranks = [sum(x >= row[k] for x in row) for row, k in zip(expected, LABEL, strict=True)]
    measured = classify.measure_ranks(classify.rank_labels(scores, LABEL), LABEL, CLASSES)
    found = {m.column: compute_value(m, 10) for m in measured}
    first = np.array(ranks) == 1
    assert found["top1"] == pytest.approx(100 * np.mean(first))
    assert found["top5"] == pytest.approx(100 * np.mean(np.array(ranks) <= 5))
    assert found["per_class"] == pytest.approx(100 * np.mean([first[k == LABEL].mean() for k in range(CLASSES)]))


def test_constant_scores_find_no_class():
    measured = classify.measure_ranks(classify.rank_labels(np.zeros((10, CLASSES)), LABEL), LABEL, CLASSES)
    assert [compute_value(m, 10) for m in measured] == [0.0, 0.0, 0.0]
    assert [m.chance for m in measured] == pytest.approx([100 / 7, 500 / 7, 100 / 7])


def test_scores_of_classes_that_are_no_numbers_are_refused():
    table = np.full((10, 3), np.nan)
    with pytest.raises(TrainingError, match="image 0 and caption 0 is nan"):
        classify.score_classes(lambda rows, columns: table[rows, columns], 10, 3, 1)


def test_prompts_of_one_word_get_a_note():
    assert "1 of 2 prompts are a single word" in classify.note_short_prompts(["dog", "a photo of a dog"])[0]
    assert classify.note_short_prompts(["a dog"]) == []
