"""A study of precomputed regions with cached text: from a frozen tower's states to one table, by the commands."""

import json

import numpy as np
import pytest
from sample_data import write_precomputed

CONFIG = "--config=configs/precomputed.py:smoke"


@pytest.mark.slow  # precompute, sweep and compare have tests of their own
def test_study_runs_from_precompute_to_table(tmp_path, towers, command):
    """Caches a frozen tower's text, fits CCA, sweeps two models, evaluates their ensemble, and compares all."""
    regions, words, runs = tmp_path / "regions", tmp_path / "words", tmp_path / "runs"
    vocabulary = ["a", "red", "blue", "circle", "square", "left", "of"]  # the vocabulary of the tower's tokenizer
    for split, images in (("train", 24), ("dev", 8)):
        write_precomputed(regions, split, images, shape=(9, 20))
        lines = [" ".join(np.random.default_rng(k).choice(vocabulary, 3 + k % 5)) for k in range(5 * images)]
        (regions / f"{split}_caps.txt").write_text("".join(f"{line}\n" for line in lines))
    data = f"--config.data.dir={regions}"
    bert = ("--config=configs/precomputed.py:smoke,text=bert", data, f"--config.text.pretrained={towers / 'bert'}")
    bert += ("--config.text.max_tokens=10",)
    command("-m mefn_jax.precompute", *bert, f"--out={words}", "--splits=train,val")
    cached = (CONFIG, data, f"--config.data.cached_text={words}", "--config.embed_dim=8", "--config.text.max_tokens=10")

    linear = command(
        "-m mefn_jax.evaluation.cca_baseline", *cached, "--split=val", "--held_out_images=6", f"--out={runs / 'linear'}"
    ).stdout
    assert "chosen on 6 held-out images" in linear
    assert json.loads((runs / "linear" / "metrics.json").read_text())["protocol"]["images"] == 8

    sweep = ("-m mefn_jax.sweep", *cached, "--config.train.ema_decay=0.5", "--config.train.steps=4", "--split=val")
    sweep += ("--models=vsepp,mefn", "--seeds=0", f"--out={runs}")
    lines = command(*sweep).stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["vsepp seed 0", "mefn seed 0", ""]  # before the table
    log = (runs / "mefn" / "0" / "log.txt").read_text()
    assert "train.init=cca: fitting CCA to 24 training images and 120 captions" in log
    assert "hub_scale" in log
    assert [line.endswith("(already done)") for line in command(*sweep).stdout.splitlines()[:3]] == [True, True, False]

    # Averaged parameters are evaluated like the trained ones.
    command("eval.py", f"--workdir={runs / 'mefn' / '0'}", "--split=val", "--ema")
    metrics = [json.loads(line) for line in (runs / "mefn" / "0" / "metrics.jsonl").read_text().splitlines()]
    at_end = [m for m in metrics if m["step"] == 4]
    folder = runs / "mefn" / "0" / "eval"
    for name, logged in (("val", "val.rsum"), ("val_ema", "ema.rsum")):
        report = json.loads((folder / name / "metrics.json").read_text())
        assert report["rsum"] == pytest.approx(next(m[logged] for m in at_end if logged in m))

    both = ("ensemble", f"{runs}/vsepp/0", f"{runs}/mefn/0")
    assert (
        "ensemble of 2 (scores averaged)" in command("eval.py", *both, "--split=val", f"--out={runs / 'both'}").stdout
    )
    names = (f"{runs}/linear", f"{runs}/*/0", f"{runs}/both", f"{folder}/val_ema")
    table = command("eval.py", "compare", *names, "--split=val", f"--out={tmp_path / 'table'}").stdout
    first = [line.split(" |")[0] for line in table.splitlines() if line.startswith("| ")]
    averaged_row = "| mefn, averaged parameters"
    assert first[1:6] == ["| CCA baseline", "| mefn", "| vsepp", "| ensemble of 2", averaged_row]
    assert (tmp_path / "table" / "compare.csv").is_file()


@pytest.mark.slow  # test_config.py traces the train step of every text
@pytest.mark.parametrize("text", ["gru", "frozen bert"])
def test_precomputed_regions_train_with_text_tower(text, tmp_path, towers, command):
    for split, images in (("train", 24), ("dev", 8)):
        write_precomputed(tmp_path / "x", split, images, shape=(9, 20))
        lines = [
            f"a {c} circle left of a {d} square" for c in ("red", "blue") for d in ("red", "blue", "a", "of", "left")
        ]
        lines = [lines[(k // 5 + k % 5) % 10] for k in range(5 * images)]
        (tmp_path / "x" / f"{split}_caps.txt").write_text("".join(f"{line}\n" for line in lines))
    options = [f"{CONFIG},text={text.split()[-1]}", f"--config.data.dir={tmp_path / 'x'}", "--config.train.steps=2"]
    if text != "gru":
        options += [f"--config.text.pretrained={towers / 'bert'}", "--config.text.max_tokens=10"]
        options += ["--config.embed_dim=8"]
    if text.startswith("frozen"):
        options += ['--config.train.lr_multipliers=("text/backbone:0",)']
    output = command("train.py", *options, f"--workdir={tmp_path / 'run'}").stdout
    assert ("train.init=cca: fitting CCA" in output) == (text != "gru")
    assert "done: 2 steps" in output
    assert "val: 8 images" in command("eval.py", f"--workdir={tmp_path / 'run'}", "--split=val").stdout
