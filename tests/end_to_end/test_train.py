"""The real commands end to end: train, evaluate, kill, resume, devices, and what they say of bad input."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers
from conftest import ROOT, environment, write_flickr8k

from mefn_jax.data import images
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.encoders.pretrained import weights
from mefn_jax.errors import CheckpointError
from mefn_jax.evaluation import evaluator
from mefn_jax.runtime.checkpoint import Checkpoints, v1

SMOKE = "--config=configs/shapes.py:smoke"


def parameters(workdir):
    """The latest checkpoint's step and all of its state, as arrays."""
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest
    state = v1.load_checkpointables(workdir / "checkpoints" / str(step), {"state": None})["state"]
    flat = {}

    def walk(path, value):
        if isinstance(value, dict):
            for key, child in value.items():
                walk(f"{path}/{key}", child)
        elif isinstance(value, list | tuple):
            for key, child in enumerate(value):
                walk(f"{path}/{key}", child)
        elif value is not None:
            flat[path] = np.asarray(value)

    walk("", state)
    return step, flat


def assert_identical(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for key, value in a[1].items():
        np.testing.assert_array_equal(value, b[1][key], err_msg=key)


def logged(workdir, name):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, command):
    """A finished smoke run on drawn scenes; its workdir and what it printed."""
    workdir = tmp_path_factory.mktemp("trained")
    return workdir, command("train.py", SMOKE, f"--workdir={workdir}").stdout


def test_train_says_what_runs_where_and_logs_each_step(trained):
    workdir, text = trained
    for name in ("model", "data", "devices", "batch", "steps", "seed", "commit", "versions", "workdir"):
        assert re.search(rf"^{name} +\S", text, re.M), name
    assert "1 x cpu" in text
    assert "16 pairs, 16 a device" in text
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/8", "4/8", "6/8", "8/8"]
    for part in ("loss", "ms/step", "pairs/s", "data", "ETA", "grad", "lr"):
        assert all(part in line for line in lines)
    assert len({line.index("ETA") for line in lines}) == 1  # aligned
    assert [len(logged(workdir, name)) for name in ("loss", "grad_norm", "learning_rate", "val.rsum")] == [4, 4, 4, 2]
    assert list((workdir / "tensorboard").glob("events.*"))


def test_eval_prints_and_writes_what_the_design_says(trained, command):
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
    assert "val: 24 images, 120 captions (5 an image), one gallery; ties against the model" in text
    for row in ("mefn (step", "caption words", "colour histogram", "chance"):
        assert re.search(rf"^{re.escape(row)}.*\d", text, re.M), row
    # A bag of words cannot tell twins apart, whatever it knows of the image.
    assert report["baselines"]["caption words"]["twins"]["all"] == pytest.approx(50, abs=5)
    # The val rSum that training logged is the one that evaluation finds at that step.
    best = report["step"]
    assert report["rsum"] == pytest.approx(logged(workdir, "val.rsum")[best], abs=1e-6)
    assert best == max(logged(workdir, "val.rsum").items(), key=lambda x: (x[1], x[0]))[0]


def test_folds_are_consecutive_and_averaged(trained, command):
    workdir, _ = trained
    text = command("eval.py", f"--workdir={workdir}", "--folds=4,1", "--step=latest", "--rerank=0.5").stdout
    assert "4 consecutive folds of 6 images, averaged" in text
    ranks = np.load(workdir / "eval" / "test" / "ranks.npz")
    assert ranks["t2i"].max() <= 6
    report = json.loads((workdir / "eval" / "test" / "metrics.json").read_text())
    assert report["t2i"]["r1"] == pytest.approx(np.mean(100 * (ranks["t2i"].reshape(4, 30) == 1)))
    assert "12 images for each caption, 50.0 % of all pairs" in text
    assert report["shortlist"]["coarse"]["rsum"] > 0
    assert report["shortlist"]["exhaustive"]["rsum"] == report["other_folds"]["1"]["rsum"]
    result = command("eval.py", f"--workdir={workdir}", "--folds=5", check=False)
    assert "--folds=5: does not divide the 24 images" in result.stderr


def test_a_checkpoint_of_an_earlier_version_is_refused_with_its_commit(trained, monkeypatch):
    meta = Checkpoints.meta

    def without(self, step):
        found = meta(self, step)
        del found["config"]["eval"]["score_tile_mib"]
        return found | {"commit": "1234abc"}

    monkeypatch.setattr(Checkpoints, "meta", without)
    with pytest.raises(CheckpointError, match=r"of an earlier version \(commit 1234abc\)"):
        evaluator.load_checkpoint(trained[0], "latest")


@pytest.mark.parametrize("model", ["mefn_no_entropy", "mefn_no_local", "mefn_no_global", "vsepp", "clip"])
def test_every_model_trains_and_evaluates(model, tmp_path, command):
    config = f"--config=configs/shapes.py:smoke,model={model}"
    command("train.py", config, f"--workdir={tmp_path}", "--config.train.steps=4")
    assert logged(tmp_path, "val.rsum")[4] > 0
    if model == "clip":  # the others' checkpoints differ from MEFN's in nothing that eval.py sees
        assert f"{model} (step 4)" in command("eval.py", f"--workdir={tmp_path}").stdout


@pytest.mark.parametrize("pair", ["resnet101,text=bert", "vit_b16,text=gru", "clip_vit_b32,text=clip"])
def test_every_pair_of_towers_trains_and_evaluates(pair, tmp_path, command):
    config = f"--config=configs/flickr30k.py:image={pair},smoke"
    command("train.py", config, f"--workdir={tmp_path}", "--config.train.steps=4")
    assert "mefn (step 4)" in command("eval.py", f"--workdir={tmp_path}").stdout


def start(cache, workdir, *args):
    return subprocess.Popen(
        [sys.executable, "train.py", SMOKE, f"--workdir={workdir}", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(cache),
    )


DROPOUT = ("--config.text.bert.dropout=0.1", "--config.image.vit.dropout=0.1")  # so that the random keys matter
LONG = ("--config.train.steps=24", "--config.train.save_every=2", "--config.train.eval_every=100", *DROPOUT)


def test_killed_runs_resume_bit_identically(tmp_path, command, cache):
    command("train.py", SMOKE, f"--workdir={tmp_path / 'whole'}", *LONG)
    for moment in range(2):  # killed again and again, at whatever moment it comes to
        process = start(cache, tmp_path / "broken", *LONG)
        lines = (line for line in process.stdout if line.startswith("step "))
        for _ in range(3):  # by the third line the first checkpoint is complete
            next(lines)
        time.sleep(0.004 * moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with Checkpoints(tmp_path / "broken", create=True) as checkpoints:
            assert checkpoints.latest is None or checkpoints.meta(checkpoints.latest)["step"] == checkpoints.latest
    text = command("train.py", SMOKE, f"--workdir={tmp_path / 'broken'}", *LONG).stdout
    assert "resuming after" in text
    assert_identical(parameters(tmp_path / "whole"), parameters(tmp_path / "broken"))
    losses = [logged(tmp_path / run, "loss") for run in ("whole", "broken")]
    common = losses[0].keys() & losses[1].keys()
    assert 24 in common
    assert all(losses[0][k] == losses[1][k] for k in common)
    again = command("train.py", SMOKE, f"--workdir={tmp_path / 'broken'}", *LONG).stdout
    assert "step 24 of 24 is done already" in again


def test_a_real_source_end_to_end(prepared, tmp_path, command):
    config = "--config=configs/flickr8k.py:smoke"
    text = command("train.py", config, f"--workdir={tmp_path}", f"--config.data.dir={prepared}").stdout
    assert "train 40 images, 200 captions; val 12, 60" in text
    table = command("eval.py", f"--workdir={tmp_path}", "--split=dev").stdout
    assert "val: 12 images, 60 captions" in table
    assert "twins" not in table
    # The data may have moved: the checkpoint needs nothing else of it.
    moved = tmp_path / "elsewhere"
    shutil.copytree(prepared, moved)
    (moved / "tokenizer.json").unlink()
    assert command("eval.py", f"--workdir={tmp_path}", "--split=val", f"--data_dir={moved}").stdout == table


def test_skip_bad_leaves_out_truncated_images_and_counts_them(tmp_path, command):
    root = write_flickr8k(tmp_path / "source", numbers=(20, 12))
    image = root / "Images" / "train_3.jpg"
    image.write_bytes(image.read_bytes()[:600])
    command("-m mefn_jax.data.prepare", "--source=flickr8k", f"--path={root}", f"--out={tmp_path / 'out'}")
    options = ("--config=configs/flickr8k.py:smoke", f"--config.data.dir={tmp_path / 'out'}")
    refused = command("train.py", *options, f"--workdir={tmp_path / 'a'}", check=False)
    assert refused.returncode == 1
    assert "image 'train_3.jpg' cannot be decoded" in refused.stderr
    assert "data.skip_undecodable=True" in refused.stderr
    text = command("train.py", *options, f"--workdir={tmp_path / 'a'}", "--config.data.skip_undecodable=True").stdout
    assert "left out 1 images of train that cannot be decoded: train_3.jpg" in text


def refusal(command, script, *args):
    """What a command that must fail says: one line, without a traceback."""
    result = command(script, *args, check=False)
    assert result.returncode in (1, 2), result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.train.stepz=4"], "unknown configuration key 'stepz'. Did you mean \"steps\""),
        (["--config.trian.steps=4"], "unknown configuration key 'trian'. Did you mean \"train\""),
        (["--config.train.steps=many"], "--config.train.steps=many"),
        (["--confg.train.steps=4"], "Unknown command line flag 'confg.train.steps'"),
        (["--config=configs/nowhere.py"], "configs/nowhere.py"),
        (["--config=configs/shapes.py:smok"], "unknown configuration argument 'smok', did you mean 'smoke'?"),
        (["--config=configs/shapes.py:model=mefm"], "clip, did you mean 'mefn'?"),
        ([SMOKE, "--config.data.dir=/nowhere"], "data.dir: /nowhere: no such directory"),
        ([SMOKE, "--config.train.batch_size=100000"], "train.batch_size=100000 exceeds the 320 training captions"),
        ([SMOKE, "--config.text.lower_case=False"], "text.lower_case=False, but the data set was prepared with True"),
        (["spare"], "unexpected argument 'spare'"),
    ],
)
def test_bad_options_are_refused_in_one_line(args, message, tmp_path, command):
    assert message in refusal(command, "train.py", f"--workdir={tmp_path}", *args)


def test_eval_without_a_run_or_step_is_refused(trained, tmp_path, command):
    assert "no checkpoints here" in refusal(command, "eval.py", f"--workdir={tmp_path}")
    workdir, _ = trained
    assert "--step=99: not best, latest or one of" in refusal(command, "eval.py", f"--workdir={workdir}", "--step=99")
    assert "no split 'tset', did you mean 'test'" in refusal(command, "eval.py", f"--workdir={workdir}", "--split=tset")


def test_another_model_in_the_workdir_is_refused_by_key(trained, command):
    workdir, _ = trained
    args = (f"--workdir={workdir}", "--config.embed_dim=64", "--config.text.bert.layers=3")
    message = refusal(command, "train.py", SMOKE, *args)
    assert "embed_dim: 32 there, 64 here" in message
    assert "text.bert.layers: 1 there, 3 here" in message
    assert "image" not in message.replace(str(workdir), "")
    assert "choose another --workdir" in message


def test_devices_that_do_not_divide_the_batch_are_refused(tmp_path, command):
    result = command("train.py", SMOKE, f"--workdir={tmp_path}", "--config.train.batch_size=12", devices=8, check=False)
    assert "train.batch_size=12 is not a multiple of the 8 devices" in result.stderr


def test_prepare_refuses_malformed_sources_in_one_line(flickr8k, tmp_path, command):
    token = flickr8k / "Flickr8k.token.txt"
    token.write_text("broken\n" + token.read_text())
    args = ("--source=flickr8k", f"--path={flickr8k}", f"--out={tmp_path / 'out'}")
    assert "Flickr8k.token.txt:1: not '<image>#<number><tab><caption>'" in refusal(
        command, "-m mefn_jax.data.prepare", *args
    )
    assert "needs --path" in refusal(command, "-m mefn_jax.data.prepare", "--source=flickr8k", "--out=x")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_old_checkpoint_intact(tmp_path, command, cache):
    """Files may not grow beyond 20 kB: writing a checkpoint then fails as on a full disk."""
    options = ("--config.train.save_every=4", "--config.train.eval_every=100")
    command("train.py", SMOKE, f"--workdir={tmp_path}", *options, "--config.train.steps=4")
    before = parameters(tmp_path)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    env = environment(cache) | {"JAX_COMPILATION_CACHE_DIR": ""}
    full = subprocess.run(
        [sys.executable, "train.py", SMOKE, f"--workdir={tmp_path}", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        preexec_fn=limit,
    )
    assert full.returncode == 1, full.stdout + full.stderr
    said = re.findall(r"error: \S+/checkpoints: could not save the checkpoint of step 8 .*", full.stderr)
    assert len(said) == 1
    assert "Earlier checkpoints are intact" in said[0]
    assert "orbax/checkpoint/_src" not in full.stderr  # no traceback of Orbax's threads
    assert_identical(before, parameters(tmp_path))
    text = command("train.py", SMOKE, f"--workdir={tmp_path}", *options).stdout
    assert "resuming after 4" in text
    assert parameters(tmp_path)[0] == 8


def test_pretrained_towers_are_trained_kept_frozen_and_evaluated(towers, command):
    workdir = towers / "run"
    options = (
        f"--config.text.pretrained={towers / 'bert'}",
        f"--config.image.pretrained={towers / 'vit'}",
        "--config.text.max_tokens=10",
        '--config.train.lr_multipliers=("text/backbone:0", "image/backbone:0.1")',
    )
    text = command("train.py", SMOKE, f"--workdir={workdir}", *options).stdout
    size = sum(leaf.size for leaf in jax.tree.leaves(weights.load_tower(towers / "bert", "text").params))
    constants = 2 * 16  # the statistics by which the tower's states are centred and scaled
    assert f"parameters, {size + constants:,} of them frozen" in text
    _, found = parameters(workdir)
    moved = {}
    for kind, name in (("text", "bert"), ("image", "vit")):
        before = jax.tree_util.tree_leaves_with_path(weights.load_tower(towers / name, kind).params)
        now = [found[f"/params/{kind}/backbone/" + "/".join(part.key for part in path)] for path, _ in before]
        moved[kind] = max(float(np.abs(a - b).max()) for a, (_, b) in zip(now, before, strict=True))
    assert moved["text"] == 0
    assert 0 < moved["image"] < 0.01
    with Checkpoints(workdir) as checkpoints:
        config = checkpoints.meta(checkpoints.latest)["config"]
    assert (config["text"]["bert"]["width"], config["image"]["vit"]["pool"]) == (16, "tanh")
    assert tuple(config["image"]["mean"]) == (0.4, 0.5, 0.6)
    assert (config["image"]["fit"], config["image"]["resample"]) == ("squash", "bicubic")
    # What has begun needs the checkpoints of the towers no more.
    shutil.rmtree(towers / "bert")
    shutil.rmtree(towers / "vit")
    assert "mefn (step" in command("eval.py", f"--workdir={workdir}").stdout
    args = ("train.py", SMOKE, f"--workdir={workdir}")
    assert "train.lr_multipliers freezes other parameters" in refusal(command, *args, *options[:-1])
    assert "image.pretrained: " in refusal(command, *args, *options, f"--config.image.pretrained={towers}")
    more = command(*args, *options[2:], "--config.train.steps=10").stdout
    assert "resuming after 8" in more
    assert "note: train.steps was 8" in more
    again = parameters(workdir)[1]
    np.testing.assert_array_equal(
        again["/params/text/backbone/words/embedding"], found["/params/text/backbone/words/embedding"]
    )


def test_clip_is_evaluated_zero_shot(clip, prepared, tmp_path, command):
    config = "--config=configs/flickr30k.py:model=clip,image=clip_vit_b32,text=clip,smoke"
    options = (
        f"--config.image.pretrained={clip}",
        f"--config.text.pretrained={clip}",
        "--config.image.size=0",
        "--config.text.max_tokens=10",
        f"--config.data.dir={prepared}",
    )
    text = command("eval.py", config, *options, "--split=val", f"--out={tmp_path / 'out'}").stdout
    assert "clip (zero-shot)" in text
    assert "text as the checkpoint's tokenizer has it, at most 10 wordpieces" in text
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["config"]["embed_dim"] == 10
    assert (report["config"]["image"]["size"], report["config"]["image"]["resample"]) == (16, "bicubic")
    # The same, written out: cosines of the projected pooled states.
    split = Dataset(prepared).split("val")
    captions = [c for k in range(split.num_images) for c in split.record(k)["captions"]]
    ids, mask = Tokenizer(weights.read_tokenizer(clip), 10, False, "keep")(captions)
    assert {tuple(ids[0, [0, -1]]), ids[0, mask[0]][-1]} == {(38, 39), 39}
    how = images.Resize(16, resample="bicubic")
    pixels = np.stack([images.decode(split.record(k)["image"], how, "") for k in range(split.num_images)])
    pixels = (pixels / 255 - np.array([0.48, 0.46, 0.41])) / np.array([0.27, 0.26, 0.28])
    pooled = []
    for kind, inputs in (("image", (pixels.astype(np.float32),)), ("text", (ids, mask))):
        tower = weights.load_tower(clip, kind)
        states = tower.module.apply({"params": tower.params}, *inputs)[1] @ tower.projection
        pooled.append(states / np.linalg.norm(states, axis=1, keepdims=True))
    scores = np.asarray(pooled[0] @ pooled[1].T)
    own = scores[split.caption_image, np.arange(split.num_captions)]
    near = np.abs(scores - own) < 1e-5
    near[split.caption_image, np.arange(split.num_captions)] = False
    higher = scores > own + 1e-5
    ranks = np.load(tmp_path / "out" / "ranks.npz")["t2i"]
    assert np.all(ranks >= 1 + higher.sum(0))
    assert np.all(ranks <= 1 + (higher | near).sum(0))


def test_what_would_be_random_is_not_evaluated(clip, towers, command):
    config = "--config=configs/flickr30k.py:smoke"
    assert "model=mefn has to be trained" in refusal(command, "eval.py", config)
    config = "--config=configs/flickr30k.py:model=clip,smoke"
    options = ("--config.image.size=16", "--config.text.max_tokens=10", f"--config.text.pretrained={clip}")
    assert "image.pretrained='': give a CLIP checkpoint" in refusal(command, "eval.py", config, *options)
    message = refusal(command, "eval.py", config, *options, f"--config.image.pretrained={towers / 'vit'}")
    assert "give a CLIP checkpoint with its projection" in message
    options = (*options, f"--config.image.pretrained={clip}")
    message = refusal(command, "eval.py", config, *options, "--config.image.pooling=mean")
    assert "image.pooling and text.pooling must be tower" in message
    assert "without a run: leave --step out" in refusal(command, "eval.py", config, *options, "--step=5")
    message = refusal(command, "eval.py", config, *options, "--workdir=x")
    assert "give one of --workdir, --config, --compare and --ensemble" in message


def test_what_a_checkpoint_leaves_unused_is_said(clip, prepared, tmp_path, command):
    options = (
        "--config=configs/flickr8k.py:smoke",
        f"--config.image.pretrained={clip}",
        f"--config.data.dir={prepared}",
        f"--workdir={tmp_path / 'run'}",
        "--config.train.steps=2",
    )
    text = command("train.py", *options).stdout
    assert "note: CLIP's projection to 10 dimensions is not used, embed_dim is 32" in text
    assert f"note: image.size=64, while {clip} was made for 16" in text


def test_a_hub_name_without_a_network_says_what_to_do(tmp_path, command, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = (f"--workdir={tmp_path}", "--config.text.pretrained=nobody/nothing-here")
    message = refusal(command, "train.py", SMOKE, *options)
    assert "nobody/nothing-here: no such directory here, nor to be had from the Hugging Face hub" in message
    assert "hf download nobody/nothing-here --local-dir DIR" in message
    message = refusal(command, "train.py", SMOKE, f"--workdir={tmp_path}", "--config.image.pretrained=/no/where/at all")
    assert "/no/where/at all: no such directory" in message


def test_a_text_tower_without_its_own_tokenizer_is_refused(towers, command):
    options = (
        f"--workdir={towers / 'run'}",
        f"--config.text.pretrained={towers / 'bert'}",
        "--config.text.max_tokens=10",
    )
    path = towers / "bert" / "tokenizer.json"
    whole = tokenizers.Tokenizer.from_file(str(path))
    path.unlink()
    assert "tokenizer.json: no such file, nor vocab.txt" in refusal(command, "train.py", SMOKE, *options)
    whole.add_tokens([f"new{k}" for k in range(40)])
    whole.save(str(path))
    assert "the tokenizer has 51 tokens, the embedding 40" in refusal(command, "train.py", SMOKE, *options)


def test_a_log_that_cannot_be_written_says_so(tmp_path, command):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    message = refusal(command, "train.py", SMOKE, f"--workdir={tmp_path}")
    assert "metrics.jsonl: cannot be written" in message
    assert "No space left on device" in message


def test_data_is_no_url(tmp_path, command):
    run = f"--workdir={tmp_path}"
    prepare = ("--source=coco", "--path=there", "--images=there", "--out=here")
    for script, args, option in (
        ("train.py", [run, SMOKE], "--config.data.dir"),
        ("eval.py", [run], "--data_dir"),
        ("-m mefn_jax.precompute", [run], "--out"),
        ("-m mefn_jax.precompute", [run, "--out=here"], "--data_dir"),
        *(("-m mefn_jax.data.prepare", prepare, option) for option in ("--path", "--images", "--out")),
    ):
        message = refusal(command, script, *args, f"{option}=gs://bucket/data")
        name = option.replace("--config.", "")
        assert f"{name}=gs://bucket/data: data must be in a local or mounted directory; mount the bucket" in message
    for script, option in (("train.py", "--workdir"), ("eval.py", "--workdir"), ("eval.py", "--out")):
        message = refusal(command, script, f"{option}=s3://bucket/run")
        assert f"{option}=s3://bucket/run: only gs:// and local or mounted directories can be used" in message


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, command):
    args = (f"--workdir={tmp_path}", "--config.train.learning_rate=1e30", "--config.train.clip_norm=1e30")
    message = refusal(command, "train.py", SMOKE, *args)
    step = int(re.search(r"step (\d+): loss", message)[1])
    assert 1 <= step <= 4
    assert "captions of the batch" in message
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None  # nothing broken was saved


def test_bytes_and_captions_survive_the_drawn_scenes(trained, cache):
    directory = next((cache / "data").glob("shapes-*"))
    records = tfds.builder_from_directory(str(directory)).as_data_source("test")
    assert records[0]["image"].shape == (96, 96, 3)
    assert len(json.loads(records[0]["scene"])["captions"]) == 5
