"""What commands make of arguments and of their environment that cannot work: one line, before any work."""

import os
import subprocess
import sys

import pytest
from commands import ROOT, SMOKE, environment, refusal

from mefn_jax.runtime.cli import expand_home


def test_expand_home_replaces_tilde_where_a_path_begins(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for argument, expected in (
        ("--workdir=~/runs/a", "--workdir=/home/me/runs/a"),
        ("--config.data.dir=~", "--config.data.dir=/home/me"),
        ("--runs=a,~/b", "--runs=a,/home/me/b"),
        ("--query=a ~ b", "--query=a ~ b"),
        ("--query=~b", "--query=~b"),
        ("~/run", "~/run"),
        ("--workdir", "--workdir"),
    ):
        assert expand_home(argument) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--workdir=README.md"], "--workdir=README.md is a file; give a directory"),
        (["--workdir=/dev/null/x"], "--workdir=/dev/null/x: cannot be written (Not a directory)"),
        ([f"--workdir={'x' * 300}"], "cannot be written (File name too long)"),
        (["--config.train.seed=99999999999999999999999"], "train.seed: 99999999999999999999999 is too large"),
        ([f"--config.train.steps={10**20}"], f"train.steps: {10**20} is too large"),
        (["--config.train.epochs=nan"], "train.epochs: nan is not a number"),
        (["--config.train.learning_rate=inf"], "train.learning_rate: inf is not a number"),
        (["--config.train.steps=0", "--config.train.epochs=1e30"], "train.epochs=1e+30 are more than"),
        (["--coordinator_address=localhost", "--num_processes=2", "--process_id=0"], "give HOST:PORT, such as"),
    ],
)
def test_train_refuses_in_one_line(args, message, command, tmp_path):
    workdir = [] if args[0].startswith("--workdir") else [f"--workdir={tmp_path / 'run'}"]
    assert message in refusal(command, "train.py", SMOKE, *workdir, *args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_PLATFORMS": "cuda"}, "error: JAX cannot use the devices (AssertionError); check JAX_"),
        ({"JAX_NUM_CPU_DEVICES": "0"}, "error: JAX cannot use the devices (RuntimeError: Unable to initialize backend"),
        ({"MEFN_CACHE": "/dev/null/x"}, "error: /dev/null/x: the drawn scenes cannot be written"),
    ],
)
def test_environment_that_cannot_work_is_named(variables, message, cache, tmp_path):
    words = [sys.executable, "train.py", SMOKE, f"--workdir={tmp_path / 'run'}"]
    env = environment(cache) | variables
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []
