"""Preprocessing of images as a checkpoint's files describe it."""

import json

import pytest

from mefn_jax.encoders.pretrained import preprocessor
from mefn_jax.errors import WeightsError

SQUASH = {"resize": "squash", "crop": 1.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": 224, "resample": 2}, {"size": 224, "resize": "squash", "crop": 1.0, "resample": "bilinear"}),
        ({"size": {"height": 384, "width": 384}}, {"size": 384, "resize": "squash", "crop": 1.0}),
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3},
            {"size": 224, "resize": "crop", "crop": 0.875, "resample": "bicubic"},
        ),
        ({"size": 224, "crop_size": 224}, {"size": 224, "resize": "crop", "crop": 1.0}),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, {"size": 224, "resize": "crop", "crop": 0.875}),
        ({"size": 384, "crop_pct": 0.875}, {"size": 384, "resize": "squash", "crop": 1.0}),
        ({"image_mean": [0.5, 0.4, 0.3], "image_std": None, "crop_pct": None}, {"mean": (0.5, 0.4, 0.3)}),
        ({"size": [96, 96], "do_normalize": False}, {"mean": (0,) * 3, "std": (1,) * 3, "size": 96} | SQUASH),
        ({"size": {"shortest_edge": 224, "longest_edge": 500}}, {"size": 224} | SQUASH),
    ],
)
def test_preprocessing_reads_options_of_checkpoint(settings, expected, tmp_path):
    assert preprocessor.read_preprocessing(tmp_path) == {}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert preprocessor.read_preprocessing(tmp_path) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 224, "width": 200}}, "only squares are supported"),
        ({"size": 200, "crop_size": 224}, "crop_size 224 is larger than size 200"),
        ({"image_mean": 0.5}, "must be three numbers"),
        ({"rescale_factor": 1.0}, "pixels are not scaled to"),
        ({"resample": 5}, "resample 5 is not supported"),
        ({"size": {"depth": 3}}, "cannot be interpreted"),
        ([], "holds a list"),
    ],
)
def test_preprocessing_names_unsupported_option(settings, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=message):
        preprocessor.read_preprocessing(tmp_path)


def test_preprocessing_reads_processor_config(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"size": 224}}))
    assert preprocessor.read_preprocessing(tmp_path) == {"size": 224} | SQUASH
