"""`python -m mefn_jax.sweep`: a run that fails, a malformed grid, and one compilation for all runs of a grid."""

import itertools
import os
import subprocess
import sys

import pytest
from commands import ROOT, environment, logged
from sample_data import write_precomputed

from mefn_jax import sweep
from mefn_jax.errors import ConfigError

CONFIG = "--config=configs/precomputed.py:smoke"


def test_sweep_names_failed_run_and_continues(tmp_path, command):
    sweep = ("-m mefn_jax.sweep", CONFIG, "--models=mefn,vsep", "--seeds=0", f"--out={tmp_path}")
    result = command(*sweep, f"--config.data.dir={tmp_path / 'nowhere'}", check=False)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"mefn seed 0: failed, error: data.dir: {tmp_path / 'nowhere'}: no such directory")
    assert lines[1].startswith("vsep seed 0: failed, error: model: 'vsep' is not one of")
    for flags, message in (
        ((), "--out=DIR is missing"),
        (("--out=x", "--seeds=a"), "--seeds=a: give numbers"),
        (("--out=x", "--grid=train.learning_rate"), "error: --grid=train.learning_rate: give KEY=VALUE,VALUE, such as"),
    ):
        assert message in command("-m mefn_jax.sweep", CONFIG, *flags, check=False).stderr


@pytest.mark.parametrize("text", ["train.learning_rate", "train.learning_rate=", "train.learning_rate=,", "=1e-3", ""])
def test_parse_grid_refuses_malformed_values(text):
    with pytest.raises(ConfigError, match=f"--grid={text}: give KEY=VALUE,VALUE"):
        sweep.parse_grid(["train.seed=0", text])


def test_parse_grid_reads_values_by_key():
    grid = sweep.parse_grid(["train.learning_rate=1e-3,5e-4", "matcher.entropy=none"])
    assert grid == {"train.learning_rate": ["1e-3", "5e-4"], "matcher.entropy": ["none"]}


@pytest.mark.parametrize("seeds", [(0,), pytest.param((0, 1, 2), marks=pytest.mark.slow)], ids=["2 runs", "6 runs"])
def test_sweep_compiles_train_step_and_initial_state_once(seeds, tmp_path):
    """Sweeps seeds and two learning rates, and counts the programs in the compilation cache that the runs share."""
    data, out = tmp_path / "data", tmp_path / "out"
    for split, images in (("train", 24), ("dev", 8)):
        write_precomputed(data, split, images, shape=(5, 8))
    words = ["-m", "mefn_jax.sweep", f"{CONFIG},text=gru", f"--config.data.dir={data}", "--config.text.vocab_size=300"]
    words += ["--config.train.steps=3", "--config.train.log_every=1", "--models=vsepp", "--split=val"]
    words += ["--grid=train.learning_rate=1e-3,5e-4", f"--seeds={','.join(map(str, seeds))}", f"--out={out}"]
    env = environment(tmp_path) | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # tiny programs compile quickly
    del env["JAX_COMPILATION_CACHE_DIR"]  # the sweep chooses it
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    settings = [f"vsepp,train.learning_rate={rate}" for rate in ("1e-3", "5e-4")]
    names = [f"{setting} seed {seed}" for setting, seed in itertools.product(settings, seeds)]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == names
    programs = [name for name in os.listdir(out / "compiled") if name.endswith("-cache")]
    for function in ("train_step", "build_state"):
        assert len([name for name in programs if name.startswith(f"jit_{function}-")]) == 1, programs
    # The runs differ all the same.
    runs = [out / setting / str(seed) for setting in settings for seed in seeds]
    assert len({tuple(logged(run, "loss").values()) for run in runs}) == len(runs)
    rates = [max(logged(run, "learning_rate").values()) for run in runs]
    assert rates == pytest.approx([1e-3] * len(seeds) + [5e-4] * len(seeds))
