"""Silent traps of pretrained towers: without its cure, each of them gives other outputs than PyTorch's."""

import json
import shutil

import jax
import numpy as np
import pytest
from commands import ROOT
from safetensors.numpy import load_file, save_file

from configs import default
from mefn_jax.encoders.pretrained import weights
from mefn_jax.encoders.pretrained.towers import load_pretrained
from mefn_jax.errors import WeightsError

FIXTURES = ROOT / "tests" / "fixtures"
PARITY = 1e-4


def measure_error(name: str, kind: str, key: str, **changes) -> float:
    """The largest relative difference of `key` from PyTorch's, of a tower of which some fields are changed. Parameters
    that the checkpoint lacks then are 0."""
    expected = np.load(FIXTURES / name / "expected.npz")
    tower = weights.load_tower(FIXTURES / name, kind)
    if kind == "text":
        inputs = expected["input_ids"].astype(np.int32), expected["attention_mask"] > 0
    else:
        inputs = (expected["pixel_values"].transpose(0, 2, 3, 1),)
    module = tower.module.clone(**changes)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes) | tower.params
    pooled = np.asarray(jax.jit(module.apply)({"params": params}, *inputs)[1])
    if "last" not in expected:  # of both towers, the embeddings are stored
        pooled = pooled @ tower.projection
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    return float(np.abs(pooled - expected[key]).max() / np.abs(expected[key]).max())


# What a converter may get wrong: the tower, its output, and the fields as they would be without the cure.
TRAPS = {
    "QuickGELU taken for GELU": ("open_clip_quick", "text", "pooled_text", {"activation": "gelu"}),
    "GELU taken for QuickGELU": ("open_clip", "image", "pooled", {"activation": "quick_gelu"}),
    "GELU's tanh form taken for its exact form": ("siglip_vision", "image", "pooled", {"activation": "gelu"}),
    "patches averaged in place of the attention head": ("siglip_vision", "image", "pooled", {"pool": "mean"}),
    "registers left out": ("dinov2_registers", "image", "pooled", {"registers": 0}),
    "positions not smoothed": ("dinov2_registers", "image", "pooled", {"antialias": False}),
    "positions smoothed": ("dinov2_not_square", "image", "pooled", {"antialias": True}),
    "layer scale left out": ("dinov2", "image", "pooled", {"layer_scale": False}),
    "positions in place of rotations": ("dinov3", "image", "pooled", {"rotation_base": 0.0}),
    "positions from 0 on": ("roberta", "text", "pooled", {"pad_id": -1}),
    "attention without distances": ("mpnet", "text", "pooled", {"distance_buckets": 0}),
    "another token of padding": ("siglip_text", "text", "pooled", {"pad_id": 0}),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_output_differs_without_the_cure(trap):
    """With it, the outputs are equal (test_huggingface.py)."""
    name, kind, key, changes = TRAPS[trap]
    assert measure_error(name, kind, key, **changes) > PARITY


def test_siglip_reads_padding_whatever_the_length():
    """The tower fills captions up to its full length, does not mask them, and pools at the last position."""
    expected = np.load(FIXTURES / "siglip_text" / "expected.npz")
    tower = weights.load_tower(FIXTURES / "siglip_text", "text")
    ids, mask = expected["input_ids"].astype(np.int32), expected["attention_mask"] > 0
    exists = np.arange(ids.shape[1]) < np.array([[9], [5], [2]])
    for length, kept in ((ids.shape[1], mask), (9, exists), (ids.shape[1], exists)):
        arrays = np.where(kept, ids, 17)[:, :length], kept[:, :length]  # what is masked does not count
        states, pooled = tower.module.apply({"params": tower.params}, *arrays)
        np.testing.assert_allclose(pooled, expected["pooled"], atol=1e-4)
        np.testing.assert_allclose(states, expected["last"][:, :length], atol=1e-4)
    # A shorter text, pooled at its own last token as other towers are, would have another embedding.
    wrong = tower.module.clone(max_positions=9)
    short = tower.params | {"positions": {"embedding": tower.params["positions"]["embedding"][:9]}}
    _, pooled = wrong.apply({"params": short}, ids[:, :9], exists[:, :9])
    assert np.abs(pooled - expected["pooled"]).max() > 0.01


def test_registers_are_no_patches():
    expected = np.load(FIXTURES / "dinov2_registers" / "expected.npz")
    tower = weights.load_tower(FIXTURES / "dinov2_registers", "image")
    (grid,), pooled = tower.module.apply({"params": tower.params}, expected["pixel_values"].transpose(0, 2, 3, 1))
    assert grid.shape == (2, 2, 2, 8)
    patches = np.asarray(grid).reshape(2, 4, 8)
    np.testing.assert_allclose(patches, expected["last"][:, 4:], atol=1e-4)
    assert np.abs(patches - expected["last"][:, 1:5]).max() > 0.1
    np.testing.assert_allclose(pooled, expected["last"][:, 0], atol=1e-4)


NEW = {
    "image": ("siglip", "dinov2_registers", "dinov2_swiglu", "dinov3", "open_clip"),
    "text": ("siglip_text", "roberta", "distilbert", "mpnet"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NEW.items() for name in names])
def test_missing_surplus_and_misshapen_tensors_are_named(kind, name, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / name)
    (path,) = (tmp_path / name).glob("*.safetensors")
    tensors = load_file(path)
    others = ("text_model.", "logit", "transformer.", "ln_final")
    own = sorted(n for n in tensors if not n.startswith(others if name in ("siglip", "open_clip") else "logit"))
    missing = next(n for n in own if n.endswith("bias"))
    misshapen = next(n for n in reversed(own) if n.endswith("weight"))
    del tensors[missing]
    tensors[misshapen] = tensors[misshapen][:1]
    save_file(tensors | {"strange.weight": np.zeros((3, 2), np.float32)}, path)
    with pytest.raises(WeightsError) as error:
        weights.load_tower(tmp_path / name, kind)
    message = str(error.value)
    assert f"missing {missing}" in message
    assert f"{misshapen} has shape" in message
    assert "surplus strange.weight (3, 2)" in message


def test_options_that_cannot_be_met_are_refused(tmp_path):
    """Options of today's towers that no tensor bounds, and SigLIP 2 of any resolution (naflex)."""
    for name, key, value, message in (
        ("dinov2_registers", "num_register_tokens", 10**9, "num_register_tokens 1000000000 must be a number in"),
        ("dinov2", "mlp_ratio", 10**6, "mlp_ratio 1000000 must be a number in"),
        ("dinov3", "rope_theta", 0.5, "rope_theta 0.5 must be a number in"),
        ("siglip", "model_type", "siglip2", "model_type 'siglip2' is no image tower that can be loaded"),
        ("dinov3", "query_bias", False, "query_bias 'False' is not supported"),
        ("roberta", "pad_token_id", -1, "pad_token_id -1 must be a number in"),
        ("mpnet", "relative_attention_num_buckets", 8, "relative_attention_num_buckets 8 must be a number in"),
    ):
        folder = tmp_path / f"{name}_{key}"
        shutil.copytree(FIXTURES / name, folder)
        config = json.loads((folder / "config.json").read_text()) | {key: value}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(WeightsError, match=message):
            weights.load_tower(folder, "text" if name in ("roberta", "mpnet") else "image")


OPEN_CLIP = {
    "vision_cfg.timm_model_name": ("vit_base", "vision_cfg.timm_model_name 'vit_base' is not supported"),
    "vision_cfg.pool_type": ("avg", "vision_cfg.pool_type 'avg' is not supported"),
    "text_cfg.hf_model_name": ("xlm-roberta-base", "text_cfg.hf_model_name 'xlm-roberta-base' is not supported"),
    "text_cfg.no_causal_mask": (True, "text_cfg.no_causal_mask 'True' is not supported"),
    "vision_cfg.width": ("8", "vision_cfg.width 8 must be a whole number"),
    "vision_cfg.mlp_ratio": (-1, "vision_cfg.mlp_ratio -1 must be a number in"),
    "embed_dim": (None, "model_cfg.embed_dim None must be a whole number"),
}


@pytest.mark.parametrize("key", OPEN_CLIP)
def test_open_clip_names_what_it_refuses(key, tmp_path):
    value, message = OPEN_CLIP[key]
    shutil.copytree(FIXTURES / "open_clip", tmp_path / "x")
    path = tmp_path / "x" / "open_clip_config.json"
    content = json.loads(path.read_text())
    section, _, name = key.rpartition(".")
    (content["model_cfg"][section] if section else content["model_cfg"])[name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=message) as error:
        weights.load_tower(tmp_path / "x", "image")
    assert str(path) in str(error.value)


def test_positions_count_from_the_tokenizers_padding(tmp_path):
    """RoBERTa's positions would be others with a tokenizer of another checkpoint."""
    from sample_data import write_tower

    directory = write_tower(tmp_path, "roberta", "roberta", 340)
    config = default.get_config().unlock()
    config.text.update(pretrained=str(directory), max_tokens=8)
    assert load_pretrained(config)[0].text.bert.pad_id == 1
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 2}))
    with pytest.raises(WeightsError, match="pad_token_id 2 of the text tower is not 1, the tokenizer's padding"):
        load_pretrained(config)
