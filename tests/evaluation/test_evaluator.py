"""The compiled model: hubness offsets in both stages, and checkpoints of other versions."""

import dataclasses

import jax
import numpy as np
import pytest
from random_features import length_mask, random_features

from configs.default import get_config
from mefn_jax.evaluation import evaluator
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.model import build_model
from mefn_jax.runtime import checkpoint
from mefn_jax.runtime.sharding import make_mesh

IMAGES, CAPTIONS, N, M, D = 9, 23, 4, 6, 8


@pytest.mark.parametrize("name", ["mefn", "scan_t2i_avg", "vsepp"])
def test_evaluator_subtracts_hub_offsets_in_both_stages(name):
    """The offsets are no part of a tile's scores."""
    config = get_config(f"model={name},smoke")
    config.matcher.hub_vectors = 4
    model = build_model(config, 100)
    images = random_features(0, IMAGES, N, D)
    texts = random_features(1, CAPTIONS, M, D, length_mask(0, CAPTIONS, M))
    embeddings = (model.matcher.embed(x) for x in (images, texts))
    params = {"matcher": model.matcher.init(jax.random.key(0), images, texts).get("params", {})}
    params["hubness"] = model.hubness.init(jax.random.key(1), *embeddings)["params"]
    evaluator = Evaluator(model, None, config, make_mesh(devices=jax.devices()[:2]))
    offsets = evaluator.hub_offsets(params, images, texts)
    assert min(np.ptp(x) for x in offsets) > 1e-3
    expected = np.asarray(jax.jit(model.score)(params, images, texts)) - offsets[0][:, None] - offsets[1]
    scores = evaluator.scores(params, images, texts)(slice(2, 7), slice(3, CAPTIONS))
    np.testing.assert_allclose(scores, expected[2:7, 3:], atol=1e-5)
    candidates = evaluator.rerank(params, images, texts, 4)
    np.testing.assert_allclose(candidates.scores, np.take_along_axis(expected.T, candidates.images, 1), atol=1e-5)


def test_checkpoints_store_their_format(trained):
    with checkpoint.Checkpoints(trained[0]) as checkpoints:
        assert checkpoints.meta(checkpoints.latest)["format"] == checkpoint.CHECKPOINT_FORMAT.number


def test_load_checkpoint_reads_earlier_format_with_its_upgrade(trained, monkeypatch):
    """A checkpoint that lacks an option gets the value that the upgrade of its format gives."""

    def drop_option(meta):
        del meta["config"]["eval"]["score_tile_mib"]
        return meta

    def add_option(meta):
        meta["config"]["eval"]["score_tile_mib"] = 0.5
        return meta

    number = checkpoint.CHECKPOINT_FORMAT.number
    later = dataclasses.replace(
        checkpoint.CHECKPOINT_FORMAT, number=number + 2, upgrades={number: drop_option, number + 1: add_option}
    )
    monkeypatch.setattr(checkpoint, "CHECKPOINT_FORMAT", later)
    loaded, _, _ = evaluator.load_checkpoint(trained[0], "latest")
    assert loaded.config.eval.score_tile_mib == 0.5
