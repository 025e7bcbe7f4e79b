"""Checkpoints of pretrained towers: their files, their options, and messages for those that cannot be loaded."""

import json
import shutil

import jax
import numpy as np
import pytest
from commands import ROOT
from safetensors.numpy import load_file, save_file

from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.encoders.pretrained import weights
from mefn_jax.encoders.pretrained.tokenizer_files import read_tokenizer
from mefn_jax.errors import WeightsError

FIXTURES = ROOT / "tests" / "fixtures"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the BERT fixture, which a test may damage, and its tensors."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "bert" / name, tmp_path)
    return tmp_path, load_file(tmp_path / "model.safetensors")


def refusal(directory, kind="text") -> str:
    """The message of the WeightsError that loading a tower raises."""
    with pytest.raises(WeightsError) as error:
        weights.load_tower(directory, kind)
    return str(error.value)


def test_load_tower_refuses_other_architecture(checkpoint):
    directory, _ = checkpoint
    assert "model_type 'bert' is no image tower that can be loaded; supported are vit, dinov2" in refusal(
        directory, "image"
    )


@pytest.mark.parametrize(("name", "kind", "known"), [("bert", "text", "gelu, gelu_new"), ("resnet", "image", "relu")])
def test_load_tower_names_unknown_activation(name, kind, known, tmp_path):
    config = json.loads((FIXTURES / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "mish"}))
    shutil.copy(FIXTURES / name / "model.safetensors", tmp_path)
    assert f"hidden_act 'mish' is not one of {known}" in refusal(tmp_path, kind)


@pytest.mark.parametrize(("name", "option"), [("bert", {"is_decoder": True}), ("vit", {"pooler_act": "relu"})])
def test_load_tower_names_unsupported_option(name, option, tmp_path):
    config = json.loads((FIXTURES / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | option))
    shutil.copy(FIXTURES / name / "model.safetensors", tmp_path)
    assert f"{next(iter(option))} " in refusal(tmp_path, "text" if name == "bert" else "image")


def test_load_tower_lists_missing_surplus_and_misshapen_tensors(checkpoint):
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
def test_load_tower_lists_transposed_tensor(name, tensor, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    shape = tensors[tensor].shape
    tensors[tensor] = np.ascontiguousarray(np.moveaxis(tensors[tensor], -1, -2))
    save_file(tensors, tmp_path / "model.safetensors")
    message = refusal(tmp_path, "text" if name == "bert" else "image")
    assert f"{tensor} has shape {tensors[tensor].shape}, expected {shape}" in message


def test_load_tower_refuses_quantized_weights(checkpoint):
    directory, tensors = checkpoint
    tensors["pooler.dense.weight"] = tensors["pooler.dense.weight"].astype(np.int8)
    save_file(tensors, directory / "model.safetensors")
    assert "pooler.dense.weight has dtype I8" in refusal(directory)


def test_load_tower_reads_logit_scale_of_clip():
    tensors = load_file(FIXTURES / "clip" / "model.safetensors")
    assert weights.load_tower(FIXTURES / "clip", "image").logit_scale == float(tensors["logit_scale"])
    assert weights.load_tower(FIXTURES / "bert", "text").logit_scale is None


def test_load_tower_names_broken_file(checkpoint):
    directory, _ = checkpoint
    (directory / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(WeightsError, match="its tokenizer cannot be read"):
        read_tokenizer(directory)
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
def test_load_tower_names_impossible_sizes(name, option, message, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | option))
    assert message in refusal(tmp_path, "text" if name == "bert" else "image")


def test_load_tower_names_vocabulary_that_does_not_match_embedding(checkpoint):
    directory, _ = checkpoint
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 41}))
    assert "embeddings.word_embeddings.weight has shape (40, 16), expected (41, 16)" in refusal(directory)


def test_load_tower_names_truncated_weights(checkpoint):
    directory, _ = checkpoint
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors: cannot be read" in refusal(directory)


def test_load_tower_refuses_pickle_and_shows_conversion(checkpoint):
    directory, _ = checkpoint
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    message = refusal(directory)
    assert "a pickle may run code" in message
    assert "safetensors.torch" in message


def test_load_tower_joins_sharded_weights(checkpoint):
    directory, tensors = checkpoint
    params = weights.load_tower(directory, "text").params
    (directory / "model.safetensors").unlink()
    sorted_names = sorted(tensors)
    shards = {"a.safetensors": sorted_names[::2], "b.safetensors": sorted_names[1::2]}
    for file, names in shards.items():
        save_file({n: tensors[n] for n in names}, directory / file)
    index = {"weight_map": {n: file for file, names in shards.items() for n in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, weights.load_tower(directory, "text").params, params)
    (directory / "b.safetensors").unlink()
    assert "lists b.safetensors" in refusal(directory)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_load_tower_converts_half_precision_to_float32(checkpoint, dtype):
    directory, tensors = checkpoint
    half = {n: t.astype(dtype) if t.dtype == np.float32 else t for n, t in tensors.items()}
    save_file(half, directory / "model.safetensors")
    loaded = weights.load_tower(directory, "text").params["words"]["embedding"]
    assert loaded.dtype == np.float32
    np.testing.assert_allclose(loaded, tensors["embeddings.word_embeddings.weight"], rtol=0.01)


def test_read_tokenizer_builds_from_vocabulary(checkpoint):
    directory, _ = checkpoint
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "##s"]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = Tokenizer(read_tokenizer(directory), 6, False, "keep")
    ids, mask = tokenizer(["A red circles", "blue"])
    np.testing.assert_array_equal(ids[0, mask[0]], [2, 5, 6, 7, 8, 3])
    np.testing.assert_array_equal(ids[1, mask[1]], [2, 1, 3])


def test_read_config_fills_in_defaults_of_transformers(tmp_path):
    text = {"model_type": "clip_text_model", "hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text}))
    loaded = weights.read_config(tmp_path)["text_config"]
    assert (loaded["hidden_size"], loaded["max_position_embeddings"], loaded["hidden_act"]) == (64, 77, "quick_gelu")


def test_load_tower_names_missing_file(tmp_path):
    assert "config.json: no such file" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "model.safetensors: no such file" in refusal(tmp_path)
