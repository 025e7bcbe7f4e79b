"""What commands make of arguments and of their environment that cannot work: one line, before any work."""

import os
import subprocess
import sys

import pytest
from commands import ROOT, SMOKE, environment, refusal

from mefn_jax.errors import ConfigError
from mefn_jax.runtime.cli import parse_count
from mefn_jax.runtime.storage import expand_home


@pytest.mark.parametrize(
    "text", ["", "\N{SUPERSCRIPT TWO}", "1,1", "-1", "+1", " 1", "1_0", "1e3", "\u0661", "10" * 12]
)
def test_parse_count_refuses_texts_that_int_refuses_or_reads_otherwise(text):
    assert parse_count(text) is None


def test_parse_count_reads_digits():
    assert [parse_count(text) for text in ("0", "7", "0012", "1000000000")] == [0, 7, 12, 10**9]


def test_expand_home_refuses_unknown_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expand_home("~/runs") == "/home/somebody/runs"
    assert [expand_home(path) for path in ("a~b", "./~x", "gs://bucket/~", "")] == ["a~b", "./~x", "gs://bucket/~", ""]
    with pytest.raises(ConfigError, match=r"~nobody_of_this_name/x: there is no home .*; write \./~nobody"):
        expand_home("~nobody_of_this_name/x")


@pytest.mark.parametrize(
    "words",
    [
        ("train.py", SMOKE, "--config.data.dir=~/nowhere"),
        ("eval.py", "--workdir=~/nowhere"),
        ("eval.py", "compare", "~/nowhere", "--out=x"),
        ("train.py", "--config=~/nowhere.py"),
    ],
)
def test_commands_expand_home_in_paths(words, command):
    assert f"{os.path.expanduser('~')}/nowhere" in refusal(command, *words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# Heading\n\nsome prose\n", "not a configuration file in Python (invalid syntax, line 3)"),
        (
            "def get_config(argument=None):\n    return 1 / 0\n",
            "fails in line 2 (ZeroDivisionError: division by zero)",
        ),
        ("import nothing_of_this_name\n", "fails in line 1 (ModuleNotFoundError"),
        ("x = 1\n", "has no function get_config"),
    ],
)
def test_configuration_file_that_is_none_is_named(content, message, tmp_path, command):
    path = tmp_path / "README.md"
    path.write_text(content)
    error = refusal(command, "train.py", f"--config={path}", f"--workdir={tmp_path}")
    assert f"--config={path}: " in error
    assert message in error


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
        *(
            ([f"--coordinator_address={address}", "--num_processes=2", "--process_id=0"], "give HOST:PORT, such as")
            for address in ("localhost", "localhost:0", "localhost:65536", ":1234")
        ),
        (["--workdir="], "--workdir= is empty; give a path, or leave the flag out"),
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


def test_memory_that_does_not_suffice_is_named_in_one_line(command, tmp_path):
    words = (f"{SMOKE},model=sfe", "--config.matcher.concepts=100000000", f"--workdir={tmp_path / 'run'}")
    assert "out of memory (JaxRuntimeError: " in refusal(command, "train.py", *words)
