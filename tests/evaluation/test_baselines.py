"""The baselines of the table on drawn scenes."""

import pytest

from mefn_jax.data import prepare
from mefn_jax.data.dataset import Dataset
from mefn_jax.evaluation import baselines, twins


def test_baselines_cannot_tell_twins_apart(tmp_path, monkeypatch):
    """On the test scenes of the default configuration, with fewer for training, to check the claim of the table."""
    monkeypatch.setenv("MEFN_CACHE", str(tmp_path))
    data = Dataset(prepare.open_drawn_scenes((300, 2, 500), 0))
    test = data.split("test")
    pairs = twins.find_twins(test)
    assert len(pairs.captions) > 1000
    for scores in (baselines.caption_word_overlap(test), baselines.color_histogram(data.split("train"), test)):
        assert twins.twin_accuracy(pairs, scores)["all"] == pytest.approx(50, abs=5)
