"""`python -m mefn_jax.sweep`: runs that fail, grids, parts at once, the summary, and one compilation for all runs."""

import contextlib
import csv
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from commands import ROOT, environment, logged
from hypothesis import given
from hypothesis import strategies as st
from sample_data import write_precomputed

from mefn_jax import sweep
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.digests import digest_gallery
from mefn_jax.errors import ConfigError, UserError
from mefn_jax.evaluation.results import METRIC_NAMES, write_results
from mefn_jax.runtime.checkpoint_format import OPTIONS_OF_6
from mefn_jax.runtime.lock import hold_lock
from mefn_jax.sweeps import earlier
from mefn_jax.sweeps.earlier import RECORD
from mefn_jax.sweeps.grid import parse_grid
from mefn_jax.sweeps.plan import choose_part, parse_part, parse_seeds

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


@pytest.mark.parametrize(
    "text", ["train.learning_rate", "train.learning_rate=", "train.learning_rate=,", "=1e-3", "", "a=(1,2", "a=1,,2"]
)
def test_parse_grid_refuses_malformed_values(text):
    with pytest.raises(ConfigError, match=re.escape(f"--grid={text}: give KEY=VALUE,VALUE")):
        parse_grid(["train.seed=0", text])


def test_parse_grid_reads_values_by_key():
    grid = parse_grid(["train.learning_rate=1e-3,5e-4", "matcher.entropy=gaussian"])
    assert grid == {"train.learning_rate": ["1e-3", "5e-4"], "matcher.entropy": ["gaussian"]}
    grid = parse_grid(["a=(7, 7),(7,)", "b=('x:0, 1',),()", "c='',x", 'd="1,2",3'])
    assert grid == {"a": ["(7, 7)", "(7,)"], "b": ["('x:0, 1',)", "()"], "c": ["", "x"], "d": ["1,2", "3"]}
    with pytest.raises(ConfigError, match=r"train\.seed is given twice"):
        parse_grid(["train.seed=0", "train.seed=1"])


@pytest.mark.slow
def test_sweep_compiles_train_step_and_initial_state_once(tmp_path):
    """Sweeps seeds and two learning rates, and counts the programs in the compilation cache that the runs share."""
    data, out, seeds = tmp_path / "data", tmp_path / "out", (0, 1, 2)
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
    lines, summary = done.stdout.split("\n\n")[:2]
    assert [line.split(":")[0] for line in lines.splitlines()] == names
    assert (out / "summary.md").read_text() == f"{summary}\n"
    (folder,) = out.glob("compiled-*")
    programs = [name for name in os.listdir(folder) if name.endswith("-cache")]
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
        if command[0] == "eval":
            side = dict.fromkeys(METRIC_NAMES, 50.0)
            gallery = digest_gallery(Dataset(self.data).split("val"))
            protocol = {"split": "val", "images": 4, "captions": 20, "folds": 1, "captions_per_image": "5", "ties": ""}
            config = {"train": {"seed": 0, "learning_rate": 1e-3, "batch_size": 8}, "data": {"dir": str(self.data)}}
            report = {"evaluated": "vsepp", "config": config, "protocol": protocol, "i2t": side, "t2i": side}
            write_results(workdir / "eval" / "val", report | {"rsum": 300.0, "data": {"gallery": gallery}}, {})
        return True

    def sweep(self, *overrides, seeds=(0,), grid=None, split="val", config=CONFIG, part=(1, 1)):
        """Returns the number of failed runs, and that of commands that were started."""
        overrides = [f"--config.data.dir={self.data}", *overrides]
        number = len(self.started)
        plan = sweep.Sweep(
            config.removeprefix("--config="), ["vsepp"], list(seeds), grid or {}, self.out, split, overrides, part
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
    (fake.out / "vsepp" / "0" / RECORD).unlink()
    assert fake.sweep(*given) == (0, 0)
    assert fake.sweep() == (0, 0)
    with pytest.raises(ConfigError, match=r"\(train\.learning_rate: 0\.001 there, 0\.1 here\)"):
        fake.sweep("--config.train.learning_rate=0.1")


def test_sweep_takes_runs_of_a_version_without_the_newest_options(fake):
    fake.sweep()
    path = fake.out / "vsepp" / "0" / RECORD
    config = json.loads(path.read_text())["config"]
    path.write_text(json.dumps({"config": {key: x for key, x in config.items() if key not in OPTIONS_OF_6}}))
    assert fake.sweep() == (0, 0)
    with pytest.raises(ConfigError, match=r"\(train\.patience: 0 there, 3 here\)"):
        fake.sweep("--config.train.patience=3")


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
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("vsepp seed")]
    assert lines[-2].startswith("vsepp seed 0: failed, ")
    assert lines[-1].endswith("(already done)")


@pytest.mark.parametrize("value", [3, "x", [1], {"gallery": [1]}, {"gallery": None, "config": {"train": 3}}, None])
@pytest.mark.parametrize("name", ["eval/val/metrics.json", RECORD])
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
    assert not (fake.out / "vsepp" / "0" / RECORD).exists()


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
        parse_seeds(texts)
    assert parse_seeds(["0", "17", "123456789012"]) == [0, 17, 123456789012]


GRID = {"train.learning_rate": ["1e-3", "2e-3"], "loss.margin": ["0.1", "0.2"]}


def in_threads(calls):
    """Calls functions at the same time, each in a thread, and returns their results."""
    results = [None] * len(calls)

    def call(k):
        results[k] = calls[k]()

    threads = [threading.Thread(target=call, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("parts", [[(1, 2), (2, 2)], [(1, 1), (1, 1)], [(1, 2), (1, 2), (2, 2), (1, 1)]])
def test_jobs_at_once_do_each_run_of_a_grid_once(parts, fake, monkeypatch, capsys):
    """2 x 2 x 2 runs by jobs of which all are within a run at the same time, when there are enough runs."""
    within, run = threading.Barrier(2), fake.run

    def slow_run(command, log, cache):
        if command[0] == "train.py":
            with contextlib.suppress(threading.BrokenBarrierError):
                within.wait(0.3)
        return run(command, log, cache)

    monkeypatch.setattr(sweep, "_succeeds", slow_run)
    results = in_threads([lambda part=part: fake.sweep(seeds=(0, 1), grid=GRID, part=part) for part in parts])
    assert [failed for failed, _ in results] == [0] * len(parts)
    started = [(command[0], next(word for word in command if "--workdir" in word)) for command in fake.started]
    assert len(started) == len(set(started)) == 16
    assert all(Path(workdir.partition("=")[2]).joinpath("eval/val/metrics.json").is_file() for _, workdir in started)
    assert not list(fake.out.rglob("*.lock"))
    table = (fake.out / "summary.md").read_text().splitlines()
    assert table[0].startswith("| model | train.learning_rate | loss.margin | seeds | i2t R@1 |")
    assert [line.split(" | ")[:4] for line in table[2:]] == [
        ["| vsepp", rate, margin, "2"] for rate in GRID["train.learning_rate"] for margin in GRID["loss.margin"]
    ]


@given(number=st.integers(0, 40), parts=st.integers(1, 50))
def test_parts_divide_runs(number, parts):
    divided = [choose_part(list(range(number)), (k, parts)) for k in range(1, parts + 1)]
    assert sorted(itertools.chain(*divided)) == list(range(number))
    assert max(map(len, divided)) - min(map(len, divided)) <= 1


@pytest.mark.parametrize("text", ["2", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", "1/99999"])
def test_parse_part_refuses_what_is_no_part(text):
    with pytest.raises(ConfigError, match=re.escape(f"--part={text}: give K/N with K from 1 to N")):
        parse_part(text)
    assert (parse_part(""), parse_part("2/8")) == ((1, 1), (2, 8))


def test_part_names_runs_that_other_parts_have_not_finished(fake, capsys):
    assert fake.sweep(seeds=(0, 1, 2), part=(1, 2)) == (0, 4)
    output = capsys.readouterr().out
    assert output.endswith("part 2/2 has no result yet of vsepp seed 1\n")
    assert "| vsepp | 2 of 3 | 50.0 ± 0.0 |" in output
    with hold_lock("--out", fake.out / "vsepp" / "1", sweep.RUN_LOCK):
        assert fake.sweep(seeds=(0, 1, 2), part=(2, 2)) == (0, 0)
        assert "vsepp seed 1: left to another job (" in capsys.readouterr().out
    assert fake.sweep(seeds=(0, 1, 2), part=(2, 2)) == (0, 2)
    assert "no result yet" not in capsys.readouterr().out


HOLD = """
import sys, time
from mefn_jax.runtime.lock import hold_lock
with hold_lock("--out", *sys.argv[1:]):
    print("holding", flush=True)
    time.sleep(60)
"""


def test_run_of_a_job_that_died_is_done_by_the_next(fake):
    folder, words = fake.out / "vsepp" / "0", [sys.executable, "-c", HOLD]
    process = subprocess.Popen([*words, folder, sweep.RUN_LOCK], stdout=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    assert fake.sweep() == (0, 0)
    process.kill()
    process.communicate()
    assert (folder / sweep.RUN_LOCK).exists()
    assert fake.sweep() == (0, 2)


@pytest.mark.parametrize(
    ("grid", "overrides", "message"),
    [
        ({"train.learning_rat": ["1"]}, [], r"no such option, did you mean 'train\.learning_rate'\?"),
        (
            {"train.batch_size": ["8", "x"]},
            [],
            r"--grid=train\.batch_size=x: cannot be read as a value of .* which is 16",
        ),
        ({"train.learning_rate": ["1e-3", "0.001"]}, [], "the value 0.001 is there twice"),
        ({"train.learning_rate": ["1e-3", "-1"]}, [], r"learning_rate=-1 seed 0 cannot work: train\.learning_rate: -1"),
        ({"train.seed": ["1"]}, [], "--grid=train.seed: is chosen by --seeds"),
        ({"model": ["mefn"]}, [], "--grid=model: is chosen by --models"),
        ({"loss.margin": ["1"]}, ["--config.loss.margin=2"], "--config.loss.margin is given, too"),
    ],
)
def test_grid_is_checked_before_anything_runs(grid, overrides, message, fake):
    with pytest.raises(ConfigError, match=message):
        fake.sweep(*overrides, grid=grid)
    assert not fake.started


def test_directory_of_a_grid_is_one_folder_whatever_the_value(fake):
    assert fake.sweep(grid={"data.cached_text": ["", "a/b", "a_b"]}) == (0, 6)
    names = {path.name for path in fake.out.iterdir() if path.is_dir()}
    assert len(names) == 3
    assert {"vsepp,data.cached_text=", "vsepp,data.cached_text=a_b"} < names
    assert all((fake.out / name / "0" / "eval").is_dir() for name in names)
    rows = list(csv.DictReader((fake.out / "summary.csv").open()))
    assert [row["data.cached_text"] for row in rows] == ["", "a/b", "a_b"]
    assert [(row["seeds"], row["rsum.mean"], row["rsum.std"]) for row in rows] == [("0", "300", "")] * 3


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [("a", "b", False), ("a:1,b:1", "a:1,b:2", True), ("a", "a:1,b:2", True), ("", "c:/x", False)],
)
def test_other_weights_of_a_mixture_are_another_run(old, new, changed):
    """Another path may be the same data that has moved, but not where there are weights."""
    assert earlier._changes_mixture({"data.dir": (old, new)}) == changed
