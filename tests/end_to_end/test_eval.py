"""`eval.py` on a trained run, and zero-shot on a CLIP checkpoint."""

import json
import re

import numpy as np
import pytest
from commands import logged, refusal

from mefn_jax.data import images
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.encoders.pretrained import weights
from mefn_jax.encoders.pretrained.tokenizer_files import read_tokenizer


def test_eval_prints_and_writes_metrics_and_baselines(trained, command):
    workdir, _ = trained
    text = command("eval.py", f"--workdir={workdir}", "--split=val").stdout
    report = json.loads((workdir / "eval" / "val" / "metrics.json").read_text())
    for side in ("i2t", "t2i"):
        assert set(report[side]) == {"r1", "r5", "r10", "medr", "meanr", "map"}
    assert report["protocol"]["images"] == 24
    assert report["protocol"]["captions"] == 120
    assert {"split", "images", "captions", "folds", "captions_per_image", "ties", "text"} <= set(report["protocol"])
    assert report["config"]["model"] == "mefn"
    assert "jax" in report["versions"]
    ranks = np.load(workdir / "eval" / "val" / "ranks.npz")
    assert (ranks["i2t"].shape, ranks["t2i"].shape) == ((24,), (120,))
    assert report["t2i"]["r5"] == pytest.approx(100 * np.mean(ranks["t2i"] <= 5))
    assert "val: 24 images, 120 captions (5 per image), one gallery; ties against the model" in text
    for row in ("mefn (step", "caption words", "color histogram", "chance"):
        assert re.search(rf"^{re.escape(row)}.*\d", text, re.M), row
    # A bag of words cannot tell twins apart, even with perfect knowledge of the image.
    assert report["baselines"]["caption words"]["twins"]["all"] == pytest.approx(50, abs=5)
    # Training logged the same rSum of val at that step.
    best = report["step"]
    assert report["rsum"] == pytest.approx(logged(workdir, "val.rsum")[best], abs=1e-6)
    assert best == max(logged(workdir, "val.rsum").items(), key=lambda x: (x[1], x[0]))[0]


def test_eval_averages_consecutive_folds_and_reranks(trained, command):
    workdir, _ = trained
    extra = ("--transductive=csls:3,querybank",)
    text = command("eval.py", f"--workdir={workdir}", "--folds=4,1", "--step=latest", "--rerank=0.5", *extra).stdout
    assert "4 consecutive folds of 6 images, averaged" in text
    ranks = np.load(workdir / "eval" / "test" / "ranks.npz")
    assert ranks["t2i"].max() <= 6
    report = json.loads((workdir / "eval" / "test" / "metrics.json").read_text())
    assert report["t2i"]["r1"] == pytest.approx(np.mean(100 * (ranks["t2i"].reshape(4, 30) == 1)))
    assert "12 images for each caption, 50.0 % of all pairs" in text
    assert report["rerank"]["embedding"]["rsum"] > 0
    assert {name: result["strength"] for name, result in report["transductive"].items()} == {"csls": 3, "querybank": 20}
    assert "csls 3 (transductive)" in text
    assert report["rerank"]["exhaustive"]["rsum"] == report["other_folds"]["1"]["rsum"]
    result = command("eval.py", f"--workdir={workdir}", "--folds=5", check=False)
    assert "--folds=5: does not divide the 24 images" in result.stderr


def test_eval_refuses_missing_run_step_or_split(trained, tmp_path, command):
    assert "no checkpoints here" in refusal(command, "eval.py", f"--workdir={tmp_path}")
    workdir, _ = trained
    assert "--step=99: not best, latest or one of" in refusal(command, "eval.py", f"--workdir={workdir}", "--step=99")
    assert "no split 'tset', did you mean 'test'" in refusal(command, "eval.py", f"--workdir={workdir}", "--split=tset")


def test_zero_shot_clip_equals_cosines_of_projected_states(clip, prepared, tmp_path, command):
    config = "--config=configs/flickr30k.py:model=clip,image=clip_vit_b32,text=clip,smoke"
    options = (
        f"--config.image.pretrained={clip}",
        f"--config.text.pretrained={clip}",
        "--config.image.size=0",
        "--config.text.max_tokens=10",
        f"--config.data.dir={prepared}",
    )
    text = command("eval.py", "zero_shot", config, *options, "--split=val", f"--out={tmp_path / 'out'}").stdout
    assert "clip (zero-shot)" in text
    tokenizer = "by the checkpoint's tokenizer of 40 tokens, lower case, punctuation kept, at most 10 wordpieces"
    assert f"\ntext {tokenizer}; images crop 100.0 % to 16 x 16, bicubic" in text
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["config"]["embed_dim"] == 10
    assert (report["config"]["image"]["size"], report["config"]["image"]["resample"]) == (16, "bicubic")
    # The same scores, written out: cosines of the projected pooled states.
    split = Dataset(prepared).split("val")
    captions = [c for k in range(split.num_images) for c in split.record(k)["captions"]]
    ids, mask = Tokenizer(read_tokenizer(clip), 10, False, "keep")(captions)
    assert {tuple(ids[0, [0, -1]]), ids[0, mask[0]][-1]} == {(38, 39), 39}
    resize = images.Resize(16, resample="bicubic")
    pixels = np.stack([images.decode(split.record(k)["image"], resize, "") for k in range(split.num_images)])
    pixels = (pixels / 255 - np.array([0.48, 0.46, 0.41])) / np.array([0.27, 0.26, 0.28])
    pooled = []
    for kind, inputs in (("image", (pixels.astype(np.float32),)), ("text", (ids, mask))):
        tower = weights.load_tower(clip, kind)
        states = tower.module.apply({"params": tower.params}, *inputs)[1] @ tower.projection
        pooled.append(states / np.linalg.norm(states, axis=1, keepdims=True))
    scores = np.asarray(pooled[0] @ pooled[1].T)
    positive_scores = scores[split.caption_image, np.arange(split.num_captions)]
    tied = np.abs(scores - positive_scores) < 1e-5
    tied[split.caption_image, np.arange(split.num_captions)] = False
    higher = scores > positive_scores + 1e-5
    ranks = np.load(tmp_path / "out" / "ranks.npz")["t2i"]
    assert np.all(ranks >= 1 + higher.sum(0))
    assert np.all(ranks <= 1 + (higher | tied).sum(0))


def test_zero_shot_refuses_untrained_towers(clip, towers, command):
    config = "--config=configs/flickr30k.py:smoke"
    assert "model=mefn has to be trained" in refusal(command, "eval.py", "zero_shot", config)
    config = "--config=configs/flickr30k.py:model=clip,smoke"
    options = ("--config.image.size=16", "--config.text.max_tokens=10", f"--config.text.pretrained={clip}")
    assert "image.pretrained='': give a CLIP or SigLIP checkpoint" in refusal(
        command, "eval.py", "zero_shot", config, *options
    )
    message = refusal(command, "eval.py", "zero_shot", config, *options, f"--config.image.pretrained={towers / 'vit'}")
    assert "give a CLIP or SigLIP checkpoint with its projection" in message
    options = (*options, f"--config.image.pretrained={clip}")
    message = refusal(command, "eval.py", "zero_shot", config, *options, "--config.image.pooling=mean")
    assert "image.pooling and text.pooling must be tower" in message
    assert "Unknown command line flag 'step'" in refusal(command, "eval.py", "zero_shot", config, *options, "--step=5")
