"""Trains and evaluates several models and seeds, one after the other; skips the runs that are finished.

    python -m mefn_jax.sweep --config=FILE.py --models=mefn,vsepp --seeds=0,1,2 --out=DIR [--split=val] \\
        [--grid=train.learning_rate=1e-3,5e-4] [--config.key=value ...]

Each run calls `train.py` and `eval.py` as a user would, in DIR/<model>/<seed>/ (with a grid in
DIR/<model>,<key>=<value>/<seed>/), and writes their output to `log.txt` there. If a run fails, its error is printed and
the others go on; the same command tries it again from its latest checkpoint. Runs that differ in seeds, learning rates
and other hyperparameters share their compiled programs.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from mefn_jax import config as configuration
from mefn_jax.config import suggest
from mefn_jax.data.digests import digest_gallery
from mefn_jax.data.from_config import open_dataset
from mefn_jax.data.mixture import parse_mixture
from mefn_jax.data.parsing import read_json
from mefn_jax.data.split import SPLIT_ALIASES
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.results import read_report
from mefn_jax.reports.rows import IGNORED_KEYS
from mefn_jax.runtime.cli import define_path_flag, run_command
from mefn_jax.runtime.console import format_duration
from mefn_jax.runtime.lock import hold_lock
from mefn_jax.runtime.outputs import check_output_directory
from mefn_jax.runtime.processes import run_child
from mefn_jax.runtime.storage import is_remote, write_atomic

ROOT = Path(__file__).resolve().parent.parent
RECORD = "sweep.json"  # file in the directory of a run, with the options that it was started with
CACHE = "compiled"  # folder in --out for the compiled programs, which all runs share


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs of models, options and seeds.

    Attributes:
        config: configuration file, with optional arguments after a colon.
        models, seeds: names of models, and seeds.
        grid: values of options by key, `{"train.learning_rate": ["1e-3", "5e-4"]}`; all combinations are run.
        out: directory of the runs, which also keeps their compiled programs.
        split: split to evaluate after training.
        overrides: flags that `train.py` gets in addition.
    """

    config: str
    models: list[str]
    seeds: list[int]
    grid: dict[str, list[str]]
    out: Path
    split: str
    overrides: list[str]


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: the run as messages name it.
        workdir: its directory.
        arguments: the flags of `train.py` without `--workdir`.
        config: the configuration that they give; None if it cannot be loaded, which `train.py` will explain.
        chosen: dotted keys of the options that the command line sets.
    """

    name: str
    workdir: Path
    arguments: list[str]
    config: ConfigDict | None
    chosen: list[str]

    def options(self) -> dict:
        """Returns the options that may change the result, by dotted key, as JSON gives them back."""
        flat = json.loads(json.dumps(configuration.flatten(self.config.to_dict())))
        ignored = tuple(key for key in IGNORED_KEYS if key != "train.seed")
        return {key: value for key, value in flat.items() if not key.startswith(ignored)}


def plan_runs(plan: Sweep) -> list[PlannedRun]:
    """Returns the runs of a sweep in order."""
    runs, values = [], [dict(zip(plan.grid, row, strict=True)) for row in itertools.product(*plan.grid.values())]
    for model, options, seed in itertools.product(plan.models, values, plan.seeds):
        setting = ",".join([model, *(f"{key}={value}" for key, value in options.items())])
        arguments = [
            f"--config={plan.config}{',' if ':' in plan.config else ':'}model={model}",
            f"--config.train.seed={seed}",
            *(f"--config.{key}={value}" for key, value in options.items()),
            *plan.overrides,
        ]
        chosen = [word.removeprefix("--config.").partition("=")[0] for word in arguments[1:]]
        workdir = plan.out / setting / str(seed)
        runs.append(PlannedRun(f"{setting} seed {seed}", workdir, arguments, load_config(arguments), chosen))
    return runs


def load_config(arguments: list[str]) -> ConfigDict | None:
    """Returns the configuration that the flags of `train.py` give; None if they cannot be read."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # configuration files import `configs`, which lies there
    values, argv = flags.FlagValues(), ["train.py", *arguments]
    try:
        config_flags.DEFINE_config_file("config", None, "", values, lock_config=True, sys_argv=argv)
        values(argv)
        return values.config
    except Exception:  # the file is Python, which can raise anything; the run will say what is wrong
        return None


def sweep(plan: Sweep) -> int:
    """Performs the missing runs and prints one line for each run. Returns the number of failed runs.

    Raises ConfigError, before any run, if the directory cannot be written, or has a run with other options or on other
    data, and LockError if another sweep runs in it.
    """
    check_output_directory("--out", plan.out, {})
    with hold_lock("--out", plan.out):
        return _run_all(plan)


def _run_all(plan: Sweep) -> int:
    failed, runs = 0, plan_runs(plan)
    check_earlier_runs(runs, plan.split)
    for run in runs:
        report, start = run.workdir / "eval" / plan.split / "metrics.json", time.perf_counter()
        if report.is_file():
            line, succeeded = describe_report(report, plan.split)
            print(f"{run.name}: {line}{' (already done)' if succeeded else ''}", flush=True)
            failed += not succeeded
            continue
        record_options(run)
        log = run.workdir / "log.txt"
        commands = (
            ["train.py", run.arguments[0], f"--workdir={run.workdir}", *run.arguments[1:]],
            ["eval.py", f"--workdir={run.workdir}", f"--split={plan.split}"],
        )
        if all(_succeeds(command, log, plan.out / CACHE) for command in commands):
            line, succeeded = describe_report(report, plan.split)
            duration = f" ({format_duration(time.perf_counter() - start)})" if succeeded else ""
            print(f"{run.name}: {line}{duration}", flush=True)
            failed += not succeeded
        else:
            failed += 1
            print(f"{run.name}: failed, {last_line(log)}; see {log}", flush=True)
    return failed


def check_earlier_runs(runs: list[PlannedRun], split: str) -> None:
    """Raises ConfigError if a directory of a run has one with other options, or evaluated on other data, or if the data
    set of a run has no such split.

    A run that resumes checks its data itself. A data set that has moved is no other data.
    """
    digests = {}
    for run in (run for run in runs if run.config is not None):
        key = json.dumps([run.config.data.to_dict(), run.config.text.max_tokens], default=str)
        if key not in digests:
            digests[key] = _make_digest(run.config, split)
        report = run.workdir / "eval" / split / "metrics.json"
        data = _read_quietly(report).get("data")
        gallery = data.get("gallery") if isinstance(data, dict) else None
        if gallery and digests[key]() not in (None, gallery):
            raise ConfigError(
                f"--out: {run.workdir} was evaluated on other images or captions than {split} of "
                f"data.dir={run.config.data.dir} has now; choose another --out, or remove it"
            )
        changes = find_changed_options(run, split)
        if (gallery or not report.is_file()) and not _changes_mixture(changes):
            changes.pop("data.dir", None)
        if changes:
            shown = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in changes.items())
            raise ConfigError(
                f"--out: {run.workdir} has a run with other options ({shown}); choose another --out, or remove it"
            )


def _make_digest(config, split: str) -> Callable[[], str | None]:
    """Returns a function that returns the digest of a split (`digest_gallery`), read when it is first called; None if
    the data cannot be read, which the run will explain. Raises ConfigError if there is no such split."""
    try:
        dataset = open_dataset(config)
    except (DataError, OSError):
        return lambda: None
    if split not in dataset.splits:
        raise ConfigError(
            f"--split={split}: {dataset.directory} has {', '.join(dataset.splits)}{suggest(split, dataset.splits)}"
        )

    @functools.cache
    def digest():
        try:
            return digest_gallery(dataset.split(split))
        except (DataError, OSError):
            return None

    return digest


def _changes_mixture(changes: dict[str, tuple]) -> bool:
    """Returns whether the data sets were, or are now, a mixture: then other paths may be other weights."""
    return any(len(parse_mixture(text)) > 1 for text in changes.get("data.dir", ()) if isinstance(text, str))


def find_changed_options(run: PlannedRun, split: str) -> dict[str, tuple]:
    """Returns the options in which a run differs from the one in its directory, `{key: (old, new)}`; empty without one.

    A run that failed before its first checkpoint is none. Runs of versions that did not record their options are
    compared in those that the command line sets.
    """
    options, record = run.options(), _read_quietly(run.workdir / RECORD)
    report = run.workdir / "eval" / split / "metrics.json"
    if not report.is_file() and not any((run.workdir / "checkpoints").glob("[0-9]*")):
        return {}
    if isinstance(record.get("config"), dict):
        return configuration.diff_configs(record["config"], options)
    old = _read_quietly(report).get("config")
    if not isinstance(old, dict):
        return {}
    old, keys = configuration.flatten(old), [key for key in run.chosen if options.get(key)]
    return {key: (old.get(key), options[key]) for key in keys if old.get(key) != options[key]}


def record_options(run: PlannedRun) -> None:
    """Writes the options of a run into its directory, for `find_changed_options`. Raises ConfigError."""
    try:
        run.workdir.mkdir(parents=True, exist_ok=True)
        if run.config is not None:
            write_atomic(epath.Path(run.workdir / RECORD), json.dumps({"config": run.options()}, indent=1).encode())
    except OSError as e:
        raise ConfigError(f"--out: {run.workdir} cannot be written ({e.strerror})") from None


def _read_quietly(path: Path) -> dict:
    """Returns the JSON object of a file; an empty one if there is none, or the file is damaged."""
    try:
        value = read_json(path)
    except DataError:
        return {}
    return value if isinstance(value, dict) else {}


def _succeeds(command: list[str], log: Path, cache: Path) -> bool:
    """Runs a command of the checkout in the current directory, appends its output to `log`, and returns whether it
    succeeded. Compiled programs are kept in `cache`, or where JAX_COMPILATION_CACHE_DIR says."""
    script, *arguments = command
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache.resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    with log.open("a", encoding="utf-8") as file:
        words = [sys.executable, ROOT / script, *arguments]
        return run_child(words, stdout=file, stderr=file, env=environment | os.environ) == 0


def describe_report(report: Path, split: str) -> tuple[str, bool]:
    """Returns the recalls of a `metrics.json` as text and True; for a damaged one, why it failed, and False."""
    try:
        metrics = read_report(report)
    except (DataError, FileNotFoundError) as e:
        return f"failed, {e}", False
    i2t, t2i = (" ".join(f"{metrics[direction][r]:.1f}" for r in ("r1", "r5", "r10")) for direction in ("i2t", "t2i"))
    return f"{split} R@1/5/10 image to text {i2t}, text to image {t2i}, rSum {metrics['rsum']:.1f}", True


def last_line(log: Path) -> str:
    """Returns the last line of a log that is not empty."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing printed"


def define_flags() -> None:
    """Defines the flags of the command."""
    define_path_flag("config", "configs/precomputed.py", "Configuration file, with optional arguments after a colon.")
    flags.DEFINE_list("models", ["mefn"], "Names of models, separated by commas.")
    flags.DEFINE_list("seeds", ["0"], "Seeds, separated by commas.")
    flags.DEFINE_multi_string(
        "grid", [], "KEY=VALUE,VALUE,...: values of an option to run; may be given several times."
    )
    define_path_flag("out", None, "Directory of the runs, in subdirectories <model>/<seed>/.")
    flags.DEFINE_string("split", "test", "Split to evaluate after training: val, test or held_out.")


def main(overrides: list[str]) -> None:
    """Runs the command."""
    f = flags.FLAGS
    if not f.out:
        raise ConfigError("--out=DIR is missing: the directory of the runs")
    if is_remote(f.out):
        raise ConfigError(f"--out={f.out}: give a directory on this machine")
    seeds, split = parse_seeds(f.seeds), SPLIT_ALIASES.get(f.split, f.split)
    if not all(f.models) or len(set(f.models)) < len(f.models):
        raise ConfigError(f"--models={','.join(f.models)}: give names separated by commas, each once")
    if sweep(Sweep(f.config, f.models, seeds, parse_grid(f.grid), Path(f.out), split, overrides)):
        sys.exit(1)


def parse_seeds(texts: list[str]) -> list[int]:
    """Parses the values of `--seeds`. Raises ConfigError if one is no number, or is there twice."""
    if not texts or not all(re.fullmatch("[0-9]{1,18}", text) for text in texts):
        raise ConfigError(f"--seeds={','.join(texts)}: give numbers separated by commas")
    seeds = list(map(int, texts))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds={','.join(texts)}: give every seed once")
    return seeds


def parse_grid(texts: list[str]) -> dict[str, list[str]]:
    """Parses the values of `--grid`. Raises ConfigError if one is not KEY=VALUE,VALUE."""
    grid = {}
    for text in texts:
        key, _, values = text.partition("=")
        grid[key] = [value for value in values.split(",") if value]
        if not key or not grid[key]:
            raise ConfigError(f"--grid={text}: give KEY=VALUE,VALUE, such as train.learning_rate=1e-3,5e-4")
    return grid


if __name__ == "__main__":
    overrides = [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
    sys.argv = [argument for argument in sys.argv if argument not in overrides]
    run_command(lambda: main(overrides), define_flags)
