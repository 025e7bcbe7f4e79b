"""Towers of the Hugging Face hub equal PyTorch's, layer by layer: on the fixtures of `reference_towers.py`, and, where
torch is installed, directly."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import reference_towers
from commands import ROOT
from safetensors.numpy import load_file, save_file

from mefn_jax.encoders.pretrained import weights
from mefn_jax.encoders.resnet import Residual
from mefn_jax.encoders.transformer import Block

FIXTURES = ROOT / "tests" / "fixtures"
TORCH = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")


def assert_equal(computed, expected):
    assert computed.shape == expected.shape
    assert np.abs(computed - expected).max() <= 1e-4 * np.abs(expected).max()


def make_inputs(kind: str, expected) -> tuple:
    if kind == "text":
        return expected["input_ids"].astype(np.int32), expected["attention_mask"] > 0
    return (expected["pixel_values"].transpose(0, 2, 3, 1),)


def run_tower(tower, kind: str, expected):
    """`(layers' outputs, states of the fragments or the last grid, pooled)` of a tower on a fixture's inputs."""
    (states, pooled), variables = jax.jit(
        lambda variables, *inputs: tower.module.apply(
            variables,
            *inputs,
            capture_intermediates=lambda module, _: isinstance(module, Block | Residual),
            mutable="intermediates",
        )
    )({"params": tower.params, "constants": tower.constants}, *make_inputs(kind, expected))
    captured = variables["intermediates"]
    last = states if kind == "text" else states[-1]
    return {name: value["__call__"][0] for name, value in captured.items()}, np.asarray(last), np.asarray(pooled)


def check_tower(directory: Path, name: str) -> None:
    architecture = (reference_towers.TOWERS | reference_towers.FULL_SIZE)[name][0]
    expected = np.load(directory / "expected.npz")
    if architecture in reference_towers.PAIRS:
        for kind, key in (("image", "pooled"), ("text", "pooled_text")):
            tower = weights.load_tower(directory, kind)
            layers, _, pooled = run_tower(tower, kind, expected)
            exists = expected["attention_mask"] > 0 if kind == "text" else ...  # padding is not compared
            for k in range(sum(name.startswith(f"{kind}_hidden") for name in expected)):
                states = np.asarray(layers[f"layer_{k}"])
                assert_equal(states[exists], expected[f"{kind}_hidden_{k + 1}"][exists])
            projected = pooled @ tower.projection
            assert_equal(projected / np.linalg.norm(projected, axis=1, keepdims=True), expected[key])
        return
    kind = "text" if architecture in reference_towers.TEXTS else "image"
    tower = weights.load_tower(directory, kind)
    layers, last, pooled = run_tower(tower, kind, expected)
    if architecture == "resnet":
        for s, depth in enumerate(tower.module.depths):
            assert_equal(layers[f"stage_{s}_block_{depth - 1}"], expected[f"hidden_{s + 1}"].transpose(0, 2, 3, 1))
        assert_equal(last, expected["last"].transpose(0, 2, 3, 1))
        assert_equal(pooled, expected["pooled"][:, :, 0, 0])
        return
    assert len(layers) == tower.module.layers
    for k in range(tower.module.layers):
        assert_equal(layers[f"layer_{k}"], expected[f"hidden_{k + 1}"])
    if kind == "image" and architecture != "clip_vision":  # which normalizes only the token that it pools
        patches = last.reshape(len(last), -1, last.shape[-1])
        assert_equal(patches, expected["last"][:, -patches.shape[1] :])
    elif kind == "text":
        assert_equal(last, expected["last"])
    assert_equal(pooled, expected["pooled"])


@pytest.mark.parametrize("name", sorted(reference_towers.TOWERS))
def test_tower_equals_pytorch(name):
    check_tower(FIXTURES / name, name)


@pytest.mark.skipif(not TORCH, reason="torch and transformers are not installed; the fixtures replace them")
@pytest.mark.parametrize("name", sorted(reference_towers.TOWERS))
def test_tower_equals_installed_pytorch(name, tmp_path):
    if name.startswith("open_clip"):
        pytest.importorskip("open_clip")
    reference_towers.write(name, tmp_path, seed=1)
    check_tower(tmp_path, name)


@pytest.mark.slow
@pytest.mark.skipif(not TORCH, reason="torch and transformers are not installed")
@pytest.mark.parametrize("name", sorted(reference_towers.FULL_SIZE))
def test_full_size_tower_equals_installed_pytorch(name, tmp_path):
    if name.startswith("open_clip"):
        pytest.importorskip("open_clip")
    reference_towers.write(name, tmp_path)
    check_tower(tmp_path, name)


def test_clip_pools_at_first_end_of_text():
    """As in transformers, a caption that itself holds the end of text is pooled there. Attention is causal, so what
    follows changes nothing."""
    tower = weights.load_tower(FIXTURES / "clip", "text")
    ids = np.array([[38, 5, 39, 7, 39], [38, 5, 39, 9, 39], [38, 5, 7, 39, 0], [38, 5, 9, 39, 0]], np.int32)
    mask = np.array([[True] * 5, [True] * 5, [True] * 4 + [False], [True] * 4 + [False]])
    states, pooled = tower.module.apply({"params": tower.params}, ids, mask)
    np.testing.assert_array_equal(pooled, states[np.arange(4), [2, 2, 3, 3]])
    np.testing.assert_allclose(pooled[0], pooled[1], rtol=1e-5)
    assert np.abs(pooled[2] - pooled[3]).max() > 1e-3


def test_tower_fixtures_are_small():
    assert sum(p.stat().st_size for p in FIXTURES.glob("*/*")) < 1_500_000


# Names of tensors in the files of the hub, and tensors that no tower takes.
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
    "data parallel": ("bert", lambda n: f"module.bert.{n}", {"module.cls.predictions.bias": (40,)}),
    "sentence-transformers in one file": ("bert", lambda n: f"0.auto_model.{n}", {}),
    "lightning": ("vit", lambda n: f"model.vit.{n}", {"model.classifier.weight": (3, 16)}),
    "compiled in data parallel": ("dinov2", lambda n: f"module._orig_mod.dinov2.{n}", {}),
    "dinov3 of today": ("dinov3", lambda n: n.replace("layer.", "model.layer.", 1), {}),
    "language model": ("xlm_roberta", lambda n: f"roberta.{n}", {"lm_head.bias": (30,)}),
    "distilled language model": ("distilbert", lambda n: f"distilbert.{n}", {"vocab_projector.bias": (30,)}),
    "siglip's image tower alone": ("siglip_vision", lambda n: f"vision_model.{n}", {"text_model.head.bias": (8,)}),
    "text without prefix": ("clip_text", lambda n: n.removeprefix("text_model."), {}),
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_load_tower_reads_every_layout_of_the_hub(layout, tmp_path):
    name, rename, more = LAYOUTS[layout]
    kind = "text" if reference_towers.TOWERS[name][0] in reference_towers.TEXTS else "image"
    config = json.loads((FIXTURES / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"projection_dim": 10}))
    tensors = {rename(n): t for n, t in load_file(FIXTURES / name / "model.safetensors").items()}
    save_file(tensors | {n: np.zeros(s, np.float32) for n, s in more.items()}, tmp_path / "model.safetensors")
    tower, original = (weights.load_tower(d, kind) for d in (tmp_path, FIXTURES / name))
    jax.tree.map(np.testing.assert_array_equal, tower.params, original.params)
    jax.tree.map(np.testing.assert_array_equal, tower.constants, original.constants)
    assert (tower.projection is not None) == (layout in ("text alone", "siglip's image tower alone"))
