"""Preprocessing of images as a checkpoint's files describe it: the pixels are those of transformers on Pillow."""

import io
import json

import numpy as np
import pytest
from commands import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from reference_pixels import SIDES, SIZE, draw_picture

from mefn_jax.data import images
from mefn_jax.encoders.pretrained import preprocessor
from mefn_jax.errors import WeightsError

# Old and new names of classes, and forms of their keys. A form is (model_type, settings).
CLIP, VIT, RESNET = "clip", "vit", "resnet"
SQUARE = {"height": 20, "width": 20}
FORMS = [
    (VIT, {}),
    (VIT, {"size": 20}),
    (VIT, {"size": [20, 20], "resample": 3}),
    (VIT, {"size": SQUARE, "do_normalize": False}),
    (VIT, {"feature_extractor_type": "ViTFeatureExtractor", "size": 20, "image_mean": [0.4, 0.5, 0.6]}),
    (VIT, {"image_processor_type": "ViTImageProcessorFast", "size": SQUARE, "resample": 1}),
    (VIT, {"size": SQUARE, "do_rescale": False}),
    (VIT, {"size": SQUARE, "do_rescale": False, "do_normalize": False}),
    (VIT, {"size": SQUARE, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0}),
    (VIT, {"size": SQUARE, "do_center_crop": True, "crop_size": 16}),
    (VIT, {"size": SQUARE, "do_normalize": None}),
    (CLIP, {"size": SQUARE, "do_rescale": None, "do_center_crop": None, "image_mean": 100}),
    (VIT, {"size": 20, "default_to_square": False, "do_center_crop": True, "crop_size": 18}),
    (VIT, {"image_processor_type": "DeiTImageProcessor"}),
    (VIT, {"feature_extractor_type": "DeiTFeatureExtractor", "size": 24, "crop_size": 20, "resample": 3}),
    (VIT, {"image_processor_type": "DeiTImageProcessor", "size": SQUARE, "do_center_crop": False}),
    (VIT, {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 23}, "crop_size": SQUARE}),
    (VIT, {"image_processor_type": "SiglipImageProcessor", "size": SQUARE}),
    ("siglip", {}),
    ("siglip", {"size": SQUARE, "image_processor_type": "SiglipImageProcessorFast"}),
    ("dinov2", {"size": {"shortest_edge": 26}, "crop_size": SQUARE, "resample": 3}),
    ("dinov2_with_registers", {"image_processor_type": "BitImageProcessor"}),
    (CLIP, {}),
    (CLIP, {"size": 20, "crop_size": 20}),
    (CLIP, {"size": SQUARE, "crop_size": SQUARE, "do_center_crop": True}),
    (CLIP, {"size": {"shortest_edge": 20}, "crop_size": SQUARE, "resample": 2}),
    (CLIP, {"size": {"shortest_edge": 25}, "crop_size": 19}),
    (CLIP, {"size": {"height": 25, "width": 25}, "crop_size": 19}),
    (CLIP, {"size": SQUARE, "do_center_crop": False}),
    (CLIP, {"use_square_size": True}),
    (CLIP, {"feature_extractor_type": "CLIPFeatureExtractor", "size": 24, "crop_size": 24, "resample": 0}),
    (CLIP, {"image_processor_type": "CLIPImageProcessorFast", "image_std": [0.2, 0.3, 0.4]}),
    (RESNET, {}),
    (RESNET, {"size": 20}),
    (RESNET, {"size": {"shortest_edge": 22}, "crop_pct": 0.9}),
    (RESNET, {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 20, "crop_pct": 0.875, "resample": 3}),
    (RESNET, {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 33}, "crop_pct": 1.0}),
    (RESNET, {"image_processor_type": "ConvNextImageProcessorFast", "size": {"shortest_edge": 384}, "crop_pct": 0.5}),
    (RESNET, {"size": {"shortest_edge": 20, "longest_edge": 22}}),
    (RESNET, {"size": 20, "do_center_crop": True, "crop_size": 20}),
]


def write(directory, model_type, form, name="preprocessor_config.json"):
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    (directory / name).write_text(json.dumps(form))
    return directory


def compute_pixels(options: dict, picture: Image.Image):
    """Normalized pixels float64 `(size, size, 3)` by the options of `config.image`."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    resize = images.Resize(options["size"], options["resize"], options["crop"], options["resample"])
    pixels = images.decode(data.getvalue(), resize, "x") / 255
    return (pixels - np.array(options["mean"])) / np.array(options["std"])


@pytest.mark.parametrize(("model_type", "form"), FORMS)
def test_pixels_equal_transformers(model_type, form, tmp_path):
    import transformers

    options = preprocessor.read_preprocessing(write(tmp_path, model_type, form))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for sides in (*SIDES, (50, 50)):
        picture = draw_picture(sides)
        expected = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        computed = compute_pixels(options, picture)
        assert computed.shape == expected.shape
        assert (np.abs(computed - expected) * np.array(options["std"]) * 255).max() < 1.01, sides


STORED = sorted((ROOT / "tests" / "fixtures" / "pixels").glob("*.npz"))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_pixels_equal_stored_ones_of_torchvision(path, tmp_path):
    """open_clip's processor and DINOv3's have no form on Pillow alone. open_clip rounds the place of its crop to an
    even number of pixels: where ours is one less, the rest of the picture is compared."""
    stored = np.load(path)
    settings = json.loads(str(stored["settings"]))
    write(tmp_path, "dinov3_vit", settings)
    if path.stem.startswith("open_clip"):
        (tmp_path / "config.json").unlink()
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}} | settings))
    options = preprocessor.read_preprocessing(tmp_path)
    for k, (width, height) in enumerate(SIDES):
        computed, expected = compute_pixels(options, draw_picture((width, height))), stored[f"pixels_{k}"]
        assert computed.shape == expected.shape
        if options["resize"] == "crop" and (SIZE * height // width - SIZE) % 4 == 3:
            computed, expected = computed[1:], expected[:-1]
        assert (np.abs(computed - expected) * np.array(options["std"]) * 255).max() < 1.01, (width, height)


def test_open_clip_refuses_other_preprocessing(tmp_path):
    """A mode or filter that is not known is refused by name; without a size, it is the model's."""
    path = tmp_path / "open_clip_config.json"
    for key, value in (("resize_mode", "longest"), ("interpolation", "random")):
        path.write_text(json.dumps({"model_cfg": {}, "preprocess_cfg": {key: value}}))
        with pytest.raises(WeightsError, match=f"preprocess_cfg.{key} '{value}' is not supported"):
            preprocessor.read_preprocessing(tmp_path)
    path.write_text(json.dumps({"model_cfg": {"vision_cfg": {"image_size": 28}}}))
    assert preprocessor.read_preprocessing(tmp_path)["size"] == 28


def test_squash_crop_differs_from_squash_and_crop():
    """The three ways to a square give different pixels, so that a wrong one would be seen."""
    base = {"size": 16, "crop": 0.8, "resample": "bicubic", "mean": (0,) * 3, "std": (1,) * 3}
    squash, crop, both = (
        compute_pixels(base | {"resize": m}, draw_picture((64, 43))) for m in ("squash", "crop", "squash_crop")
    )
    for a, b in ((squash, crop), (squash, both), (crop, both)):
        assert np.abs(a - b).max() * 255 > 10


def test_read_preprocessing_prefers_nested_processor_config(tmp_path):
    assert preprocessor.read_preprocessing(tmp_path) == {}
    write(tmp_path, CLIP, {"processor_class": "CLIPProcessor"}, "processor_config.json")
    assert preprocessor.read_preprocessing(tmp_path) == {}
    write(tmp_path, CLIP, {"size": 30, "crop_size": 30})
    assert preprocessor.read_preprocessing(tmp_path)["size"] == 30
    nested = {"image_processor_type": "CLIPImageProcessor", "size": 20, "crop_size": 18}
    write(tmp_path, CLIP, {"image_processor": nested}, "processor_config.json")
    options = preprocessor.read_preprocessing(tmp_path)
    assert (options["size"], options["crop"], options["resample"]) == (18, 0.9, "bicubic")


@pytest.mark.parametrize(
    ("model_type", "form", "message"),
    [
        (VIT, {"size": {"height": 224, "width": 200}}, "size 224 x 200 is not square"),
        (CLIP, {"crop_size": {"height": 224, "width": 200}}, "crop_size 224 x 200 is not square"),
        (CLIP, {"size": 200, "crop_size": 224}, "crop_size 224 is larger than size 200"),
        (CLIP, {"do_center_crop": False}, "size.shortest_edge without do_center_crop keeps"),
        (CLIP, {"size": {"shortest_edge": 224, "longest_edge": 500}}, "size.longest_edge is not supported"),
        (VIT, {"do_center_crop": True}, "do_center_crop needs a crop_size"),
        (VIT, {"do_resize": False}, "do_resize False is not supported"),
        (VIT, {"do_resize": None}, "do_resize None is not supported"),
        (VIT, {"image_mean": None}, "image_mean must not be null"),
        (VIT, {"rescale_factor": None}, "rescale_factor must not be null"),
        (VIT, {"size": None}, "size must not be null"),
        (RESNET, {"size": 224, "crop_pct": None}, "crop_pct must not be null"),
        (VIT, {"image_processor_type": "ViTFeatureExtractor"}, "'ViTFeatureExtractor' is not supported"),
        (VIT, {"do_pad": True}, "do_pad true is not supported"),
        (VIT, {"resample": 5}, "resample 5 is not supported"),
        (VIT, {"resample": None}, "resample None is not supported"),
        (VIT, {"resample": True}, "resample True is not supported"),
        (VIT, {"resample": "bicubic"}, "resample bicubic is not supported"),
        (RESNET, {"size": {"height": 224, "width": 224}}, "size needs shortest_edge"),
        (RESNET, {"size": 224, "crop_pct": 1.5}, "crop_pct 1.5 must be at most 1"),
        (RESNET, {"size": 224, "crop_pct": 1e-300}, "must be at most 1 and not tiny"),
        (RESNET, {"size": 224, "crop_pct": 0}, "crop_pct 0 must be a number above 0"),
        (RESNET, {"do_center_crop": True, "crop_size": 30}, "crop_size must equal size.shortest_edge 384"),
        (VIT, {"image_processor_type": "BeitImageProcessor"}, "'BeitImageProcessor' is not supported"),
        (VIT, {"image_processor_type": "pipeline"}, "'pipeline' is not supported"),
        (VIT, {"image_processor_type": ["ViTImageProcessor"]}, "is not supported"),
        ("bert", {"size": 224}, "names no image_processor_type, and model_type 'bert'"),
        (["vit"], {"size": 224}, "names no image_processor_type"),
        (VIT, {"size": "x"}, "size x must be of whole numbers"),
        (VIT, {"size": 1e400}, "size inf must be"),
        (VIT, {"size": 10**9}, "size 1000000000 must be of whole numbers of pixels in 1 to 4096"),
        (VIT, {"size": 224.0}, "size 224.0 must be"),
        (VIT, {"size": -5}, "size -5 must be"),
        (VIT, {"size": True}, "size True must be"),
        (VIT, {"size": []}, r"size \[\] is not supported"),
        (VIT, {"size": {"depth": 3}}, "size {'depth': 3} is not supported"),
        (CLIP, {"crop_size": -1}, "crop_size -1 must be"),
        (CLIP, {"crop_size": {"height": [], "width": 3}}, "must be of whole numbers"),
        (VIT, {"image_std": [0, 0, 0]}, r"image_std \[0, 0, 0\] must be above 0"),
        (VIT, {"image_std": -0.5}, "image_std -0.5 must be above 0"),
        (VIT, {"image_mean": [0.5, float("nan"), 0.5]}, "must be three numbers"),
        (VIT, {"image_mean": [0.5]}, "image_mean .* must be three numbers"),
        (VIT, {"image_mean": "abc"}, "image_mean abc must be three numbers"),
        (VIT, {"rescale_factor": 0}, "rescale_factor 0 must be a number above 0"),
        (VIT, {"rescale_factor": 1e-320}, "gives no finite pixels"),
        (VIT, {"do_normalize": "yes"}, "do_normalize yes must be true or false"),
        (VIT, [], "holds a list"),
    ],
)
def test_read_preprocessing_names_file_and_key(model_type, form, message, tmp_path):
    with pytest.raises(WeightsError, match=message) as error:
        preprocessor.read_preprocessing(write(tmp_path, model_type, form))
    assert str(tmp_path / "preprocessor_config.json") in str(error.value)
    assert "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([224, 0.5, "ViT"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = [
    *preprocessor.SWITCH_SETTINGS,
    *preprocessor.NUMBER_SETTINGS,
    *preprocessor.COLOR_SETTINGS,
    *preprocessor.SIZE_SETTINGS,
    "resample",
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model_type=st.sampled_from([VIT, CLIP, RESNET]),
    form=JSON | st.dictionaries(st.sampled_from([*KEYS, "image_processor_type", "feature_extractor_type"]), JSON),
)
def test_read_preprocessing_raises_only_its_own_error(model_type, form, tmp_path):
    try:
        options = preprocessor.read_preprocessing(write(tmp_path, model_type, form))
    except WeightsError as e:
        message = str(e)
    else:
        message = "preprocessor_config.json"
        assert options["resize"] in images.RESIZE_MODES
        assert min(options["std"]) > 0
    assert "preprocessor_config.json" in message


def test_read_preprocessing_names_deep_nesting(tmp_path):
    write(tmp_path, VIT, {})
    (tmp_path / "preprocessor_config.json").write_text("[" * 100_000)
    with pytest.raises(WeightsError, match="nested too deeply"):
        preprocessor.read_preprocessing(tmp_path)
