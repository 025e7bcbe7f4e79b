"""Today's towers in the real commands: any mixture trains, resumes, evaluates and is compiled; zero-shot rows."""

import json

import numpy as np
import pytest
from commands import SMOKE, read_state, refusal
from sample_data import write_tower

from mefn_jax.data import images
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.encoders.pretrained import weights
from mefn_jax.encoders.pretrained.tokenizer_files import read_tokenizer

# image, text, its tokenizer and its rows, and the largest number of tokens of a caption.
MIXTURES = {
    "dinov2+xlmr": ("dinov2_registers", "xlm_roberta", "xlm_roberta", 120, 8),
    "siglip2": ("siglip", "siglip", "siglip2", 450, 11),
    "siglip": ("siglip", "siglip", "siglip", 120, 11),
    "dinov3+roberta": ("dinov3", "roberta", "roberta", 340, 8),
    "open_clip+distilbert": ("open_clip", "distilbert", "roberta", 340, 10),
    "dinov2_giant+mpnet": ("dinov2_swiglu", "mpnet", "roberta", 340, 8),
}


@pytest.fixture
def mixture(tmp_path):
    """`mixture(name)` writes both checkpoints and returns the options that name them."""

    def write(name):
        image, text, tokenizer, rows, tokens = MIXTURES[name]
        text = write_tower(tmp_path, text, tokenizer, rows)
        image = text if image == "siglip" else write_tower(tmp_path, image)
        return [
            f"--config.image.pretrained={image}",
            f"--config.text.pretrained={text}",
            f"--config.text.max_tokens={tokens}",
            "--config.image.size=24",
        ]

    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_trains_resumes_and_evaluates(name, mixture, tmp_path, command):
    options = [*mixture(name), "--config.train.steps=4", "--config.image.region_grids=(3,)"]
    run = f"--workdir={tmp_path / 'run'}"
    if name == "siglip2":  # with adapters
        options += ["--config.train.lora.rank=2"]
    command("train.py", SMOKE, run, *options)
    first = read_state(tmp_path / "run")[1]
    text = command("train.py", SMOKE, run, *options, "--config.train.steps=6").stdout
    assert "resuming after 4" in text
    state = read_state(tmp_path / "run")[1]
    trained = {key for key in first if np.any(first[key] != state[key]) and key.startswith("/params")}
    if name == "siglip2":
        assert {"lora", "image", "text", "matcher"} <= {key.split("/")[2] for key in trained}
        assert not any("/params/image/backbone" in key or "/params/text/backbone" in key for key in trained)
        changed = refusal(command, "train.py", SMOKE, run, *options, "--config.train.lora.rank=3")
        assert "train.lora.rank" in changed
    else:
        assert any("/params/image/backbone" in key for key in trained)
    assert "mefn (step 6)" in command("eval.py", run, "--step=latest").stdout


@pytest.mark.parametrize("tokenizer", ["siglip2", pytest.param("siglip", marks=pytest.mark.slow)])
def test_zero_shot_siglip_equals_cosines_of_pooled_states(tokenizer, prepared, tmp_path, command):
    rows = MIXTURES[tokenizer][3]
    directory = write_tower(tmp_path, "siglip", tokenizer, rows)
    (directory / "preprocessor_config.json").write_text('{"size": {"height": 8, "width": 8}}')
    options = (
        "--config=configs/flickr30k.py:model=siglip,image=siglip2_b16,text=siglip2,smoke",
        f"--config.image.pretrained={directory}",
        f"--config.text.pretrained={directory}",
        "--config.image.size=0",
        "--config.text.max_tokens=9",
        f"--config.data.dir={prepared}",
        "--split=val",
        f"--out={tmp_path / 'out'}",
    )
    text = command("eval.py", "zero_shot", *options).stdout
    assert "siglip (zero-shot)" in text
    case = "lower case, punctuation " + ("kept" if tokenizer == "siglip2" else "removed")
    assert f"{case}, at most 9 wordpieces, padded to 12 without a mask; images squash to 8 x 8, bicubic" in text
    split = Dataset(prepared).split("val")
    captions = [c for k in range(split.num_images) for c in split.record(k)["captions"]]
    own = Tokenizer(read_tokenizer(directory), 11, False, "keep")
    ids, _ = own(captions)
    assert ids.shape[1] == 12
    resize = images.Resize(8, "squash", resample="bicubic")
    pixels = np.stack([images.decode(split.record(k)["image"], resize, "") for k in range(split.num_images)])
    pooled = []
    for kind, inputs in (("image", (pixels.astype(np.float32) / 127.5 - 1,)), ("text", (ids, ids >= 0))):
        tower = weights.load_tower(directory, kind)
        module = tower.module.clone(pad_id=own.pad) if kind == "text" else tower.module
        states = np.asarray(module.apply({"params": tower.params}, *inputs)[1])
        pooled.append(states / np.linalg.norm(states, axis=1, keepdims=True))
    scores = pooled[0] @ pooled[1].T
    positive = scores[split.caption_image, np.arange(split.num_captions)]
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["config"]["embed_dim"] == 8
    np.testing.assert_allclose(np.load(tmp_path / "out" / "ranks.npz")["positive_scores"], positive, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_mixture_is_compiled_for_a_slice(name, mixture, tmp_path, command):
    options = [*mixture(name), "--config.train.batch_size=64"]
    text = command(
        "train.py", SMOKE, *options, "--compile_for=v5e:2x4", f"--compile_report={tmp_path / 'r.json'}"
    ).stdout
    assert json.loads((tmp_path / "r.json").read_text())["fits"], text
