"""The compiled model: hubness offsets in both stages, and checkpoints of earlier versions."""

import jax
import numpy as np
import pytest
from random_features import length_mask, random_features

from configs.default import get_config
from mefn_jax.errors import CheckpointError
from mefn_jax.evaluation import evaluator
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.model import build_model
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.runtime.sharding import make_mesh

IMAGES, CAPTIONS, N, M, D = 9, 23, 4, 6, 8


def test_evaluator_subtracts_hub_offsets_in_both_stages():
    """The offsets are no part of a tile's scores."""
    config = get_config("model=mefn,smoke")
    config.matcher.hub_vectors = 4
    model = build_model(config, 100)
    images = random_features(0, IMAGES, N, D)
    texts = random_features(1, CAPTIONS, M, D, length_mask(0, CAPTIONS, M))
    params = {"matcher": model.matcher.init(jax.random.key(0), images, texts)["params"]}
    evaluator = Evaluator(model, None, config, make_mesh(devices=jax.devices()[:2]))
    expected = np.asarray(jax.jit(model.score)(params, images, texts))
    offsets = evaluator.hub_offsets(params, images, texts)
    assert min(np.ptp(x) for x in offsets) > 1e-3
    scores = evaluator.scores(params, images, texts)(slice(2, 7), slice(3, CAPTIONS))
    np.testing.assert_allclose(scores, expected[2:7, 3:], atol=1e-5)
    candidates = evaluator.rerank(params, images, texts, 4)
    np.testing.assert_allclose(candidates.scores, np.take_along_axis(expected.T, candidates.images, 1), atol=1e-5)


def test_load_checkpoint_refuses_earlier_version_with_its_commit(trained, monkeypatch):
    meta = Checkpoints.meta

    def meta_without_option(self, step):
        values = meta(self, step)
        del values["config"]["eval"]["score_tile_mib"]
        return values | {"commit": "1234abc"}

    monkeypatch.setattr(Checkpoints, "meta", meta_without_option)
    with pytest.raises(CheckpointError, match=r"was written by an earlier version \(commit 1234abc\)"):
        evaluator.load_checkpoint(trained[0], "latest")
