"""Towers equal PyTorch's, layer by layer: from fixtures of `reference_towers.py`, and directly where torch is."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.encoders.pretrained import preprocessor, weights
from mefn_jax.encoders.resnet import Residual
from mefn_jax.encoders.transformer import Block
from mefn_jax.errors import WeightsError
from tests import reference_towers

SQUASH = {"fit": "squash", "crop": 1.0}
FIXTURES = Path(__file__).parent / "fixtures"
TORCH = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")


def assert_equal(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def inputs_of(kind: str, expected) -> tuple:
    if kind == "text":
        return expected["input_ids"].astype(np.int32), expected["attention_mask"] > 0
    return (expected["pixel_values"].transpose(0, 2, 3, 1),)


def run(tower, kind: str, expected):
    """`(layers' outputs, states of the fragments or the last grid, pooled)` of a tower on a fixture's inputs."""
    (states, pooled), variables = jax.jit(
        lambda params, *inputs: tower.module.apply(
            {"params": params},
            *inputs,
            capture_intermediates=lambda module, _: isinstance(module, Block | Residual),
            mutable="intermediates",
        )
    )(tower.params, *inputs_of(kind, expected))
    captured = variables["intermediates"]
    last = states if kind == "text" else states[-1]
    return {name: value["__call__"][0] for name, value in captured.items()}, np.asarray(last), np.asarray(pooled)


def check(directory: Path, name: str) -> None:
    architecture = reference_towers.TOWERS[name][0]
    expected = np.load(directory / "expected.npz")
    if architecture == "clip":
        for kind, key in (("image", "pooled"), ("text", "pooled_text")):
            tower = weights.load_tower(directory, kind)
            projected = run(tower, kind, expected)[2] @ tower.projection
            assert_equal(projected / np.linalg.norm(projected, axis=1, keepdims=True), expected[key])
        return
    kind = "text" if architecture in ("bert", "clip_text") else "image"
    tower = weights.load_tower(directory, kind)
    layers, last, pooled = run(tower, kind, expected)
    if architecture == "resnet":
        for s, depth in enumerate(tower.module.depths):
            assert_equal(layers[f"stage_{s}_block_{depth - 1}"], expected[f"hidden_{s + 1}"].transpose(0, 2, 3, 1))
        assert_equal(last, expected["last"].transpose(0, 2, 3, 1))
        assert_equal(pooled, expected["pooled"][:, :, 0, 0])
        return
    assert len(layers) == tower.module.layers
    for k in range(tower.module.layers):
        assert_equal(layers[f"layer_{k}"], expected[f"hidden_{k + 1}"])
    if architecture == "vit":  # CLIP's vision tower normalises only what it pools
        assert_equal(last.reshape(len(last), -1, last.shape[-1]), expected["last"][:, 1:])
    elif kind == "text":
        assert_equal(last, expected["last"])
    assert_equal(pooled, expected["pooled"])


@pytest.mark.parametrize("name", sorted(reference_towers.TOWERS))
def test_equals_pytorch(name):
    check(FIXTURES / name, name)


@pytest.mark.skipif(not TORCH, reason="torch and transformers are not installed; the fixtures stand for them")
@pytest.mark.parametrize("name", sorted(reference_towers.TOWERS))
def test_equals_pytorch_directly(name, tmp_path):
    reference_towers.write(name, tmp_path, seed=1)
    check(tmp_path, name)


def test_fixtures_are_small():
    assert sum(p.stat().st_size for p in FIXTURES.rglob("*") if p.is_file()) < 1_000_000


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the BERT fixture, to be broken, and its tensors."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "bert" / name, tmp_path)
    return tmp_path, load_file(tmp_path / "model.safetensors")


def refusal(directory, kind="text") -> str:
    with pytest.raises(WeightsError) as error:
        weights.load_tower(directory, kind)
    return str(error.value)


def test_another_architecture_is_refused(checkpoint):
    directory, _ = checkpoint
    assert "model_type 'bert' is no image tower that can be loaded; there are vit, resnet, clip" in refusal(
        directory, "image"
    )


@pytest.mark.parametrize(("name", "kind", "known"), [("bert", "text", "gelu, gelu_new"), ("resnet", "image", "relu")])
def test_an_unknown_activation_is_named(name, kind, known, tmp_path):
    config = json.loads((FIXTURES / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "mish"}))
    shutil.copy(FIXTURES / name / "model.safetensors", tmp_path)
    assert f"hidden_act 'mish' is not one of {known}" in refusal(tmp_path, kind)


@pytest.mark.parametrize(("name", "option"), [("bert", {"is_decoder": True}), ("vit", {"pooler_act": "relu"})])
def test_an_option_that_is_not_built_is_named(name, option, tmp_path):
    config = json.loads((FIXTURES / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | option))
    shutil.copy(FIXTURES / name / "model.safetensors", tmp_path)
    assert f"{next(iter(option))} " in refusal(tmp_path, "text" if name == "bert" else "image")


def test_missing_surplus_and_misshapen_tensors_are_listed(checkpoint):
    directory, tensors = checkpoint
    del tensors["encoder.layer.1.output.dense.bias"]
    tensors["encoder.layer.2.output.dense.bias"] = np.zeros(3, np.float32)
    tensors["pooler.dense.weight"] = np.zeros((3, 4), np.float32)
    save_file(tensors, directory / "model.safetensors")
    message = refusal(directory)
    assert "missing encoder.layer.1.output.dense.bias (16,)" in message
    assert "surplus encoder.layer.2.output.dense.bias (3,)" in message
    assert "pooler.dense.weight has shape (3, 4), expected (16, 16)" in message


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("bert", "embeddings.word_embeddings.weight"),
        ("bert", "encoder.layer.0.intermediate.dense.weight"),
        ("clip", "visual_projection.weight"),
        ("vit", "embeddings.position_embeddings"),
    ],
)
def test_a_tensor_of_the_right_size_and_the_wrong_shape_is_listed(name, tensor, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    shape = tensors[tensor].shape
    tensors[tensor] = np.ascontiguousarray(np.moveaxis(tensors[tensor], -1, -2))
    save_file(tensors, tmp_path / "model.safetensors")
    message = refusal(tmp_path, "text" if name == "bert" else "image")
    assert f"{tensor} has shape {tensors[tensor].shape}, expected {shape}" in message


def test_quantised_weights_are_refused(checkpoint):
    directory, tensors = checkpoint
    tensors["pooler.dense.weight"] = tensors["pooler.dense.weight"].astype(np.int8)
    save_file(tensors, directory / "model.safetensors")
    assert "pooler.dense.weight has dtype int8" in refusal(directory)


# How names and further tensors stand in the files of the hub.
LAYOUTS = {
    "masked language model": ("bert", lambda n: f"bert.{n}", {"cls.predictions.bias": (40,)}),
    "oldest names": (
        "bert",
        lambda n: f"bert.{n}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ),
        {"bert.embeddings.position_ids": (1, 12)},
    ),
    "question answering": ("bert", lambda n: f"bert.{n}", {"qa_outputs.weight": (2, 16)}),
    "image classifier": ("vit", lambda n: f"vit.{n}", {"classifier.weight": (3, 16)}),
    "masked images": ("vit", lambda n: n, {"embeddings.mask_token": (1, 1, 16)}),
    "resnet classifier": ("resnet", lambda n: f"resnet.{n}", {"classifier.1.bias": (3,)}),
    "text alone": (
        "clip_text",
        lambda n: f"text_model.{n.removeprefix('text_model.')}",
        {"text_projection.weight": (10, 16)},
    ),
    "vision alone": ("clip_vision", lambda n: n.removeprefix("vision_model."), {"embeddings.position_ids": (1, 5)}),
    "text without prefix": ("clip_text", lambda n: n.removeprefix("text_model."), {}),
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layouts_of_the_hub_give_the_same_parameters(layout, tmp_path):
    name, rename, more = LAYOUTS[layout]
    kind = "text" if name in ("bert", "clip_text") else "image"
    config = json.loads((FIXTURES / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"projection_dim": 10}))
    tensors = {rename(n): t for n, t in load_file(FIXTURES / name / "model.safetensors").items()}
    save_file(tensors | {n: np.zeros(s, np.float32) for n, s in more.items()}, tmp_path / "model.safetensors")
    found, whole = (weights.load_tower(d, kind) for d in (tmp_path, FIXTURES / name))
    jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)
    assert (found.projection is not None) == (layout == "text alone")


def test_clips_scale_is_read():
    tensors = load_file(FIXTURES / "clip" / "model.safetensors")
    assert weights.load_tower(FIXTURES / "clip", "image").logit_scale == float(tensors["logit_scale"])
    assert weights.load_tower(FIXTURES / "bert", "text").logit_scale is None


def test_broken_files_are_named(checkpoint):
    directory, _ = checkpoint
    (directory / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(WeightsError, match="no tokenizer can be made of its files"):
        weights.read_tokenizer(directory)
    (directory / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(directory)
    (directory / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json: is not JSON" in refusal(directory)
    (directory / "config.json").write_text("[]")
    assert "config.json: holds a list, not an object" in refusal(directory)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("vit", {"image_size": [16, 24]}, "image_size [16, 24] is not square"),
        ("vit", {"patch_size": 0}, "config.json: "),
        ("bert", {"num_attention_heads": 3}, "config.json: "),
    ],
)
def test_sizes_that_make_no_tower_are_named(name, option, message, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | option))
    assert message in refusal(tmp_path, "text" if name == "bert" else "image")


def test_a_vocabulary_that_does_not_match_the_embedding_is_named(checkpoint):
    directory, _ = checkpoint
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 41}))
    assert "embeddings.word_embeddings.weight has shape (40, 16), expected (41, 16)" in refusal(directory)


def test_truncated_weights_are_named(checkpoint):
    directory, _ = checkpoint
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors: cannot be read" in refusal(directory)


def test_a_pickle_is_refused_with_the_conversion(checkpoint):
    directory, _ = checkpoint
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    message = refusal(directory)
    assert "a pickle may run code" in message
    assert "safetensors.torch" in message


def test_sharded_weights(checkpoint):
    directory, tensors = checkpoint
    whole = weights.load_tower(directory, "text").params
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, directory / file)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, weights.load_tower(directory, "text").params, whole)
    (directory / "b.safetensors").unlink()
    assert "lacks b.safetensors" in refusal(directory)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_become_float32(checkpoint, dtype):
    directory, tensors = checkpoint
    half = {n: t.astype(dtype) if t.dtype == np.float32 else t for n, t in tensors.items()}
    save_file(half, directory / "model.safetensors")
    found = weights.load_tower(directory, "text").params["words"]["embedding"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, tensors["embeddings.word_embeddings.weight"], rtol=0.01)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({"size": 224, "resample": 2}, {"size": 224, "fit": "squash", "crop": 1.0, "resample": "bilinear"}),
        ({"size": {"height": 384, "width": 384}}, {"size": 384, "fit": "squash", "crop": 1.0}),
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3},
            {"size": 224, "fit": "crop", "crop": 0.875, "resample": "bicubic"},
        ),
        ({"size": 224, "crop_size": 224}, {"size": 224, "fit": "crop", "crop": 1.0}),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, {"size": 224, "fit": "crop", "crop": 0.875}),
        ({"size": 384, "crop_pct": 0.875}, {"size": 384, "fit": "squash", "crop": 1.0}),
        ({"image_mean": [0.5, 0.4, 0.3], "image_std": None, "crop_pct": None}, {"mean": (0.5, 0.4, 0.3)}),
        ({"size": [96, 96], "do_normalize": False}, {"mean": (0,) * 3, "std": (1,) * 3, "size": 96} | SQUASH),
        ({"size": {"shortest_edge": 224, "longest_edge": 500}}, {"size": 224} | SQUASH),
    ],
)
def test_preprocessing_is_the_checkpoints(found, wanted, tmp_path):
    assert preprocessor.preprocessing(tmp_path) == {}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(found))
    assert preprocessor.preprocessing(tmp_path) == wanted


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"size": {"height": 224, "width": 200}}, "only squares are built"),
        ({"size": 200, "crop_size": 224}, "crop_size 224 is more than size 200"),
        ({"image_mean": 0.5}, "must be three numbers"),
        ({"rescale_factor": 1.0}, "pixels are not scaled to"),
        ({"resample": 5}, "resample 5 is none of"),
        ({"size": {"depth": 3}}, "makes no sense"),
        ([], "holds a list"),
    ],
)
def test_preprocessing_that_cannot_be_done_is_named(found, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(found))
    with pytest.raises(WeightsError, match=message):
        preprocessor.preprocessing(tmp_path)


def test_preprocessing_may_stand_in_the_processors_file(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"size": 224}}))
    assert preprocessor.preprocessing(tmp_path) == {"size": 224} | SQUASH


def test_a_tokenizer_is_made_of_a_vocabulary_alone(checkpoint):
    directory, _ = checkpoint
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "##s"]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = Tokenizer(weights.read_tokenizer(directory), 6, False, "keep")
    ids, mask = tokenizer(["A red circles", "blue"])
    np.testing.assert_array_equal(ids[0, mask[0]], [2, 5, 6, 7, 8, 3])
    np.testing.assert_array_equal(ids[1, mask[1]], [2, 1, 3])


def test_defaults_that_a_config_leaves_out_are_those_of_transformers(tmp_path):
    text = {"model_type": "clip_text_model", "hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text}))
    found = weights.read_config(tmp_path)["text_config"]
    assert (found["hidden_size"], found["max_position_embeddings"], found["hidden_act"]) == (64, 77, "quick_gelu")


def test_no_checkpoint_at_all(tmp_path):
    assert "config.json: no such file" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "model.safetensors: no such file" in refusal(tmp_path)
