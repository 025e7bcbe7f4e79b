"""Explanations by the command, and messages for requests that cannot be met."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from random_explanation import random_explanation

from configs import precomputed
from mefn_jax.encoders.grids import grid_boxes
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation import evaluator
from mefn_jax.evaluation.run import Gallery, TrainedRun
from mefn_jax.matching.cosine import PooledCosine
from mefn_jax.reports import explain, explanation

CAPTION = "a red circle is left of a big blue square"


def test_eval_command_writes_explanations(mefn_run, command, tmp_path):
    text = command("eval.py", "explain", f"--workdir={mefn_run}", "--number=2", "--split=val").stdout
    for k in (1, 2):
        assert f"wrote {mefn_run}/eval/val/explain/{k:02}.png" in text
        assert Image.open(mefn_run / "eval" / "val" / "explain" / f"{k:02}.png").width > 1000
    Image.new("RGB", (40, 90), (200, 30, 30)).save(tmp_path / "a photo.jpg")
    request = f"--image={tmp_path / 'a photo.jpg'}", f"--caption={CAPTION}"
    text = command("eval.py", "explain", f"--workdir={mefn_run}", *request).stdout
    assert f"wrote {mefn_run}/eval/explain/a_photo.png" in text
    assert CAPTION in text


def test_explain_names_request_that_cannot_be_met(mefn_run, tmp_path):
    with pytest.raises(DataError, match=r"--image=.*nothing\.jpg: No such file"):
        explain.draw_image_file(TrainedRun(mefn_run, "latest"), str(tmp_path / "nothing.jpg"), CAPTION)
    with pytest.raises(ConfigError, match="without words"):
        explain.draw_image_file(TrainedRun(mefn_run, "latest"), str(tmp_path / "nothing.jpg"), " ")
    with pytest.raises(ConfigError, match="this model takes images"):
        explain.draw_captions(TrainedRun(mefn_run, "latest"), Gallery(split="val"), 1, boxes="boxes.npy")
    with pytest.raises(ConfigError, match=r"give a \.png file"):
        explain.draw_image_file(TrainedRun(mefn_run, "latest"), "x.jpg", CAPTION, out="x.jpg")
    model, params, _ = evaluator.load_checkpoint(mefn_run, "latest")
    without_map = dataclasses.replace(model.model, matcher=PooledCosine())
    with pytest.raises(ConfigError, match="has no attention"):
        explanation.explain_features(dataclasses.replace(model, model=without_map), params, None, None)


def test_region_sources_attach_boxes_and_photographs(tmp_path):
    path = tmp_path / "boxes.npy"
    np.save(path, np.tile(grid_boxes(3, 3), (4, 1, 1)))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (80, 50), (10, 200, 10)).save(tmp_path / "photos" / "17.jpg")
    sources = explain.read_region_sources(str(path), str(tmp_path / "photos"), 4)
    x = sources.attach(random_explanation(["a", "dog"], side=None, boxes=False), 2, "17")
    np.testing.assert_array_equal(x.boxes, grid_boxes(3, 3))
    assert x.photo.shape == (225, 360, 3)
    with pytest.raises(DataError, match=r"no 18, 18\.jpg"):
        sources.attach(x, 2, "18")
    with pytest.raises(DataError, match="9 per image, but the model has 5"):
        sources.attach(random_explanation(["a"], regions=5), 0, "17")
    with pytest.raises(DataError, match=r"expected \(5, regions, 4\), found \(4, 9, 4\)"):
        explain.read_region_sources(str(path), "", 5)
    np.save(path, 3 * np.ones((5, 9, 4)))
    with pytest.raises(DataError, match="from 0 to 1"):
        explain.read_region_sources(str(path), "", 5)
    with pytest.raises(ConfigError, match="no such folder"):
        explain.read_region_sources("", str(tmp_path / "none"), 5)
    assert explain.read_region_sources("", "", 5) is None
    config = precomputed.get_config()
    grid = config.image.regions.grid
    model_of_regions = evaluator.Evaluator(None, None, config, None)
    np.testing.assert_array_equal(explanation.find_region_boxes(model_of_regions, grid**2), grid_boxes(grid, grid))
    assert explanation.find_region_boxes(model_of_regions, 36) is None
