"""Trains and evaluates several models and seeds, one after the other; skips the runs that are finished.

    python -m mefn_jax.sweep --config=FILE.py --models=mefn,vsepp --seeds=0,1,2 --out=DIR [--split=val] \\
        [--grid=train.learning_rate=1e-3,5e-4] [--config.key=value ...]

Each run calls `train.py` and `eval.py` as a user would, in DIR/<model>/<seed>/ (with a grid in
DIR/<model>,<key>=<value>/<seed>/), and writes their output to `log.txt` there. If a run fails, its error is printed and
the others go on; the same command tries it again from its latest checkpoint. Runs that differ in seeds, learning rates
and other hyperparameters share their compiled programs.
"""

import dataclasses
import itertools
import json
import os
import sys
import time
from pathlib import Path

from absl import flags

from mefn_jax.data.split import SPLIT_ALIASES
from mefn_jax.errors import ConfigError
from mefn_jax.runtime.cli import run_command
from mefn_jax.runtime.console import format_duration
from mefn_jax.runtime.lock import hold_lock
from mefn_jax.runtime.processes import run_child

ROOT = Path(__file__).resolve().parent.parent
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


def sweep(plan: Sweep) -> int:
    """Performs the missing runs and prints one line for each run. Returns the number of failed runs. Raises
    LockError if another sweep runs in the same directory."""
    with hold_lock("--out", plan.out):
        return _run_all(plan)


def _run_all(plan: Sweep) -> int:
    failed, values = 0, [dict(zip(plan.grid, row, strict=True)) for row in itertools.product(*plan.grid.values())]
    for model, options, seed in itertools.product(plan.models, values, plan.seeds):
        setting = ",".join([model, *(f"{key}={value}" for key, value in options.items())])
        workdir, name = plan.out / setting / str(seed), f"{setting} seed {seed}"
        report, start = workdir / "eval" / plan.split / "metrics.json", time.perf_counter()
        if report.is_file():
            print(f"{name}: {recall_line(report, plan.split)} (already done)", flush=True)
            continue
        workdir.mkdir(parents=True, exist_ok=True)
        flags_of_run = [f"--config.{key}={value}" for key, value in options.items()]
        commands = (
            [
                "train.py",
                f"--config={plan.config}{',' if ':' in plan.config else ':'}model={model}",
                f"--workdir={workdir}",
                f"--config.train.seed={seed}",
                *flags_of_run,
                *plan.overrides,
            ],
            ["eval.py", f"--workdir={workdir}", f"--split={plan.split}"],
        )
        if all(_succeeds(command, workdir / "log.txt", plan.out / CACHE) for command in commands):
            duration = format_duration(time.perf_counter() - start)
            print(f"{name}: {recall_line(report, plan.split)} ({duration})", flush=True)
        else:
            failed += 1
            print(f"{name}: failed, {last_line(workdir / 'log.txt')}; see {workdir / 'log.txt'}", flush=True)
    return failed


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


def recall_line(report: Path, split: str) -> str:
    """Returns the recalls of a `metrics.json` as text."""
    metrics = json.loads(report.read_text(encoding="utf-8"))
    i2t, t2i = (" ".join(f"{metrics[direction][r]:.1f}" for r in ("r1", "r5", "r10")) for direction in ("i2t", "t2i"))
    return f"{split} R@1/5/10 image to text {i2t}, text to image {t2i}, rSum {metrics['rsum']:.1f}"


def last_line(log: Path) -> str:
    """Returns the last line of a log that is not empty."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing printed"


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "config", "configs/precomputed.py", "Configuration file, with optional arguments after a colon."
    )
    flags.DEFINE_list("models", ["mefn"], "Names of models, separated by commas.")
    flags.DEFINE_list("seeds", ["0"], "Seeds, separated by commas.")
    flags.DEFINE_multi_string(
        "grid", [], "KEY=VALUE,VALUE,...: values of an option to run; may be given several times."
    )
    flags.DEFINE_string("out", None, "Directory of the runs, in subdirectories <model>/<seed>/.")
    flags.DEFINE_string("split", "test", "Split to evaluate after training: val, test or held_out.")


def main(overrides: list[str]) -> None:
    """Runs the command."""
    f = flags.FLAGS
    if not f.out:
        raise ConfigError("--out=DIR is missing: the directory of the runs")
    seeds = f.seeds
    if not all(seed.isdecimal() for seed in seeds):
        raise ConfigError(f"--seeds={','.join(seeds)}: give numbers separated by commas")
    split = SPLIT_ALIASES.get(f.split, f.split)
    if sweep(Sweep(f.config, f.models, list(map(int, seeds)), parse_grid(f.grid), Path(f.out), split, overrides)):
        sys.exit(1)


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
