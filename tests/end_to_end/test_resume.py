"""Killed runs resume to bit-identical parameters, and with the learning rate that is given then; a run with another
model does not resume."""

import shutil
import signal
import subprocess
import sys

import numpy as np
from commands import ROOT, SMOKE, assert_equal_states, environment, logged, read_state, refusal

from mefn_jax.runtime.checkpoint import Checkpoints


def start_train(cache, workdir, *args):
    return subprocess.Popen(
        [sys.executable, "train.py", SFE, f"--workdir={workdir}", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(cache),
    )


SFE = f"{SMOKE},model=sfe"  # a system with constants from the training data
DROPOUT = ("--config.text.bert.dropout=0.1", "--config.image.vit.dropout=0.1")  # so that random keys matter
TEACHER = ("--config.loss.name=sel_distill", "--config.train.ema_decay=0.9")  # so that the average matters
LONG = ("--config.train.steps=24", "--config.train.save_every=2", "--config.train.eval_every=100", *DROPOUT, *TEACHER)


def test_killed_run_resumes_bit_identically(tmp_path, command, cache):
    command("train.py", SFE, f"--workdir={tmp_path / 'whole'}", *LONG)
    process = start_train(cache, tmp_path / "broken", *LONG)
    lines = (line for line in process.stdout if line.startswith("step "))
    for _ in range(3):  # by the third line the first checkpoint is complete
        next(lines)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with Checkpoints(tmp_path / "broken", create=True) as checkpoints:
        assert checkpoints.meta(checkpoints.latest)["step"] == checkpoints.latest
    text = command("train.py", SFE, f"--workdir={tmp_path / 'broken'}", *LONG).stdout
    assert "resuming after" in text
    assert "computing constants" not in text
    whole, broken = read_state(tmp_path / "whole"), read_state(tmp_path / "broken")
    assert_equal_states(whole, broken)
    assert any(np.any(x) for name, x in whole[1].items() if name.startswith("/constants/matcher/visual_nodes"))
    losses = [logged(tmp_path / run, "loss") for run in ("whole", "broken")]
    common = losses[0].keys() & losses[1].keys()
    assert 24 in common
    assert all(losses[0][k] == losses[1][k] for k in common)
    again = command("train.py", SFE, f"--workdir={tmp_path / 'broken'}", *LONG).stdout
    assert "step 24 of 24 is done already" in again


def test_resume_refuses_other_config_by_key(trained, command):
    workdir, _ = trained
    args = (f"--workdir={workdir}", "--config.embed_dim=64", "--config.text.bert.layers=3")
    message = refusal(command, "train.py", SMOKE, *args)
    assert "embed_dim: 32 there, 64 here" in message
    assert "text.bert.layers: 1 there, 3 here" in message
    assert "image" not in message.replace(str(workdir), "")
    assert "choose another --workdir" in message


def test_resumed_run_uses_its_own_learning_rate(trained, command, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "8")
    _, before = read_state(workdir)
    # A step of 1e-30 changes no parameter that is not 0.
    options = ("--config.train.learning_rate=1e-30", f"--workdir={workdir}")
    text = command("train.py", SMOKE, *options).stdout
    assert "resuming after 4" in text
    assert "note: train.learning_rate was " in text
    rates, old_rates = (logged(run, "learning_rate") for run in (workdir, trained[0]))
    assert rates[4] == old_rates[4] > 1e-5
    assert 0 < rates[6] < 1e-29 < old_rates[6]
    step, after = read_state(workdir)
    names = [name for name in after if name.startswith("/params/")]
    assert step == 8
    assert len(names) > 10
    for name in names:
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=1e-28, err_msg=name)
    _, other = read_state(trained[0])
    assert sum(np.any(np.abs(other[name] - before[name]) > 1e-6) for name in names) > 10
