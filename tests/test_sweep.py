"""`python -m mefn_jax.sweep`: a run that fails, a malformed grid, and one compilation for all runs of a grid."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment, logged
from sample_data import write_precomputed

from mefn_jax import sweep
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.digests import digest_gallery
from mefn_jax.errors import ConfigError, UserError
from mefn_jax.evaluation.results import METRIC_NAMES, write_results

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
    grid = sweep.parse_grid(["train.learning_rate=1e-3,5e-4", "matcher.entropy=gaussian"])
    assert grid == {"train.learning_rate": ["1e-3", "5e-4"], "matcher.entropy": ["gaussian"]}


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


class FakeRuns:
    """A sweep whose commands are replaced: training does nothing, and evaluation writes the same result each time."""

    def __init__(self, root, monkeypatch):
        self.data, self.out, self.started = root / "data", root / "out", []
        self.write_data()
        monkeypatch.setattr(sweep, "_succeeds", self.run)

    def write_data(self, text="A dog"):
        for split, images in (("train", 10), ("dev", 4)):
            write_precomputed(self.data, split, images, shape=(5, 8))
            path = self.data / f"{split}_caps.txt"
            path.write_text(path.read_text().replace("A dog", text))

    def run(self, command, log, cache):
        self.started.append(command)
        workdir = next(Path(word.partition("=")[2]) for word in command if word.startswith("--workdir="))
        if command[0] == "eval.py":
            side = dict.fromkeys(METRIC_NAMES, 50.0)
            gallery = digest_gallery(Dataset(self.data).split("val"))
            protocol = {"split": "val", "images": 4, "captions": 20, "folds": 1, "captions_per_image": "5", "ties": ""}
            config = {"train": {"seed": 0, "learning_rate": 1e-3, "batch_size": 8}, "data": {"dir": str(self.data)}}
            report = {"evaluated": "vsepp", "config": config, "protocol": protocol, "i2t": side, "t2i": side}
            write_results(workdir / "eval" / "val", report | {"rsum": 300.0, "data": {"gallery": gallery}}, {})
        return True

    def sweep(self, *overrides, seeds=(0,), grid=None, split="val", config=CONFIG):
        """Returns the number of failed runs, and that of commands that were started."""
        overrides = [f"--config.data.dir={self.data}", *overrides]
        number = len(self.started)
        plan = sweep.Sweep(
            config.removeprefix("--config="), ["vsepp"], list(seeds), grid or {}, self.out, split, overrides
        )
        return sweep.sweep(plan), len(self.started) - number


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return FakeRuns(tmp_path, monkeypatch)


def test_sweep_refuses_other_options_than_those_of_a_run_that_is_there(fake, capsys):
    assert fake.sweep("--config.train.batch_size=8") == (0, 2)
    assert fake.sweep("--config.train.batch_size=8") == (0, 0)
    assert "(already done)" in capsys.readouterr().out
    assert fake.sweep("--config.train.batch_size=8", "--config.train.log_every=3") == (0, 0)  # does not change a result
    for overrides, message in (
        (
            ("--config.train.batch_size=8", "--config.train.learning_rate=0.1"),
            r"train\.learning_rate: .* there, 0\.1 h",
        ),
        ((), r"train\.batch_size: 8 there, \d+ here"),
    ):
        with pytest.raises(ConfigError, match=rf"vsepp/0 has a run with other options \({message}"):
            fake.sweep(*overrides)
    # A run that has begun counts, too, and no other begins before the refusal.
    (fake.out / "vsepp" / "0" / "eval" / "val" / "metrics.json").unlink()
    (fake.out / "vsepp" / "0" / "checkpoints" / "8").mkdir(parents=True)
    number = len(fake.started)
    with pytest.raises(ConfigError, match="has a run with other options"):
        fake.sweep(seeds=(1, 0))
    assert len(fake.started) == number


def test_sweep_tries_a_run_that_failed_at_once_with_other_options(fake):
    fake.sweep("--config.train.batch_size=8")
    (fake.out / "vsepp" / "0" / "eval" / "val" / "metrics.json").unlink()
    assert fake.sweep() == (0, 2)
    with pytest.raises(ConfigError, match=r"train\.batch_size: \d+ there, 8 here"):
        fake.sweep("--config.train.batch_size=8")


def test_sweep_takes_results_on_a_data_set_that_has_moved(fake, tmp_path):
    fake.sweep()
    fake.data = fake.data.rename(tmp_path / "moved")
    assert fake.sweep() == (0, 0)


def test_sweep_compares_given_options_with_runs_of_earlier_versions(fake):
    given = ("--config.train.batch_size=8", "--config.train.learning_rate=1e-3")
    assert fake.sweep(*given) == (0, 2)
    (fake.out / "vsepp" / "0" / sweep.RECORD).unlink()
    assert fake.sweep(*given) == (0, 0)
    assert fake.sweep() == (0, 0)
    with pytest.raises(ConfigError, match=r"\(train\.learning_rate: 0\.001 there, 0\.1 here\)"):
        fake.sweep("--config.train.learning_rate=0.1")


def test_sweep_refuses_results_on_other_data_and_unknown_splits(fake):
    fake.sweep()
    fake.write_data("A moon")
    with pytest.raises(ConfigError, match=r"was evaluated on other images or captions than val of data\.dir="):
        fake.sweep()
    with pytest.raises(ConfigError, match=r"--split=tset: .* has val, train"):
        fake.sweep(split="tset", seeds=(5,))


def test_sweep_goes_on_after_a_damaged_result(fake, capsys):
    fake.sweep(seeds=(0, 1))
    (fake.out / "vsepp" / "0" / "eval" / "val" / "metrics.json").write_text("[]")
    assert fake.sweep(seeds=(0, 1)) == (1, 0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("vsepp seed 0: failed, ")
    assert lines[-1].endswith("(already done)")


@pytest.mark.parametrize("value", [3, "x", [1], {"gallery": [1]}, {"gallery": None, "config": {"train": 3}}, None])
@pytest.mark.parametrize("name", ["eval/val/metrics.json", sweep.RECORD])
def test_sweep_reads_any_record_of_a_run_or_refuses_it(name, value, fake):
    fake.sweep()
    path = fake.out / "vsepp" / "0" / name
    for content in ({"data": value, "config": value}, {"config": {"train": value}}, value):
        path.write_text(json.dumps(content))
        with contextlib.suppress(UserError):
            fake.sweep()


def test_sweep_leaves_it_to_the_run_to_explain_a_configuration_that_cannot_be_read(fake, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    assert fake.sweep(config=f"{tmp_path / 'broken.py'}:smoke") == (0, 2)
    assert not (fake.out / "vsepp" / "0" / sweep.RECORD).exists()


def test_sweep_reads_data_from_the_directory_where_it_is_started(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "precomputed.py") + ":smoke"
    assert fake.sweep("--config.data.dir=data", config=config) == (0, 2)
    fake.write_data("A moon")
    with pytest.raises(ConfigError, match="was evaluated on other images or captions"):
        fake.sweep("--config.data.dir=data", config=config)


@pytest.mark.parametrize("place", ["file", "file/below", "n" * 300, "zero\0"])
def test_sweep_refuses_directory_that_cannot_be_written(place, fake, tmp_path):
    (tmp_path / "file").touch()
    fake.out = tmp_path / place
    with pytest.raises(ConfigError, match="--out="):
        fake.sweep()
    assert not fake.started


@pytest.mark.parametrize(
    "texts", [[], [""], ["\N{SUPERSCRIPT TWO}"], ["1", "1"], ["-1"], ["1.0"], ["10" * 12], ["1", "01"]]
)
def test_parse_seeds_refuses_what_is_no_number_or_there_twice(texts):
    with pytest.raises(ConfigError, match=f"--seeds={','.join(texts)}: give "):
        sweep.parse_seeds(texts)
    assert sweep.parse_seeds(["0", "17", "123456789012"]) == [0, 17, 123456789012]


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [("a", "b", False), ("a:1,b:1", "a:1,b:2", True), ("a", "a:1,b:2", True), ("", "c:/x", False)],
)
def test_other_weights_of_a_mixture_are_another_run(old, new, changed):
    """Another path may be the same data that has moved, but not where there are weights."""
    assert sweep._changes_mixture({"data.dir": (old, new)}) == changed
