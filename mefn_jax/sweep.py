"""Trains and evaluates several models, options and seeds, one after the other; skips the runs that are finished.

    python -m mefn_jax.sweep --config=FILE.py --models=mefn,vsepp --seeds=0,1,2 --out=DIR [--split=val] \\
        [--grid=train.learning_rate=1e-3,5e-4] [--grid=loss.name=triplet,info_nce] [--part=2/8] [--config.key=value ...]

Each run calls `train.py` and `eval.py` as a user would, in DIR/<model>/<seed>/ (with a grid in
DIR/<model>,<key>=<value>/<seed>/), and writes their output to `log.txt` there. If a run fails, its error is printed and
the others go on; the same command tries it again from its latest checkpoint. Runs that differ in seeds, learning rates
and other hyperparameters share their compiled programs. `--part=K/N` performs every N-th run from the K-th on, so that
N jobs divide a sweep; a run that another job performs just now is left to it. At the end, `summary.md` and
`summary.csv` have means and standard deviations over the seeds.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

from absl import flags

from mefn_jax.data.split import SPLIT_ALIASES
from mefn_jax.errors import ConfigError, DataError, LockError
from mefn_jax.evaluation.results import read_report
from mefn_jax.runtime.cli import define_path_flag, run_command
from mefn_jax.runtime.compile_cache import digest_processor
from mefn_jax.runtime.config_files import find_config
from mefn_jax.runtime.console import format_duration
from mefn_jax.runtime.lock import hold_lock
from mefn_jax.runtime.outputs import check_output_directory
from mefn_jax.runtime.processes import run_child
from mefn_jax.runtime.storage import is_remote
from mefn_jax.sweeps.earlier import check_earlier_runs, record_options
from mefn_jax.sweeps.grid import check_grid, parse_grid
from mefn_jax.sweeps.plan import PlannedRun, Sweep, choose_part, parse_part, parse_seeds, plan_runs
from mefn_jax.sweeps.summary import SUMMARY_FILES, write_summary

CACHE = "compiled"  # folder in --out for the compiled programs of one kind of processor, which all runs share
RUN_LOCK = ".sweep.lock"  # in the directory of a run, beside the lock of its training


def sweep(plan: Sweep) -> int:
    """Performs the missing runs of a sweep, or of a part of it, and prints one line for each run, then the summary.
    Returns the number of failed runs.

    Raises ConfigError, before any run, if the grid does not fit the configuration, if the directory cannot be written,
    or if it has a run with other options or on other data.
    """
    check_output_directory("--out", plan.out, SUMMARY_FILES)
    runs = plan_runs(plan)
    check_grid(plan, runs)
    check_earlier_runs(runs, plan.split)
    failed = sum(not perform_run(plan, run) for run in choose_part(runs, plan.part))
    if len(runs) > 1:
        print(f"\n{write_summary(runs, plan.out, plan.split)}\nwrote {plan.out}/summary.md and summary.csv", flush=True)
    print_unfinished(plan, runs)
    return failed


def perform_run(plan: Sweep, run: PlannedRun) -> bool:
    """Performs a run, unless it is finished or another job performs it, and prints its line. Returns whether it did not
    fail. The lock of a job that died is free, and the run goes on from its latest checkpoint."""
    with contextlib.ExitStack() as stack:
        if not run.report(plan.split).is_file():
            try:
                stack.enter_context(hold_lock("--out", run.workdir, RUN_LOCK))
            except LockError as e:
                holder = str(e).partition("; ")[0]
                print(f"{run.name}: left to another job ({holder})", flush=True)
                return True
        if run.report(plan.split).is_file():  # perhaps since a moment ago
            line, succeeded = describe_report(run.report(plan.split), plan.split)
            print(f"{run.name}: {line}{' (already done)' if succeeded else ''}", flush=True)
            return succeeded
        return _train_and_evaluate(plan, run)


def _train_and_evaluate(plan: Sweep, run: PlannedRun) -> bool:
    start, log = time.perf_counter(), run.workdir / "log.txt"
    record_options(run)
    commands = (
        ["train", run.arguments[0], f"--workdir={run.workdir}", *run.arguments[1:]],
        ["eval", f"--workdir={run.workdir}", f"--split={plan.split}"],
    )
    cache = plan.out / f"{CACHE}-{digest_processor()}"  # jobs on several machines may share the disk
    if not all(_succeeds(command, log, cache) for command in commands):
        print(f"{run.name}: failed, {last_line(log)}; see {log}", flush=True)
        return False
    line, succeeded = describe_report(run.report(plan.split), plan.split)
    duration = f" ({format_duration(time.perf_counter() - start)})" if succeeded else ""
    print(f"{run.name}: {line}{duration}", flush=True)
    return succeeded


def print_unfinished(plan: Sweep, runs: list[PlannedRun]) -> None:
    """Prints which runs of other parts have no result yet."""
    parts = plan.part[1]
    for k in (k for k in range(1, parts + 1) if k != plan.part[0]):
        names = [run.name for run in choose_part(runs, (k, parts)) if not run.report(plan.split).is_file()]
        if names:
            print(f"part {k}/{parts} has no result yet of {', '.join(names)}", flush=True)


def _succeeds(command: list[str], log: Path, cache: Path) -> bool:
    """Runs a command of `mefn_jax/commands/` in the current directory, appends its output to `log`, and returns whether
    it succeeded. Compiled programs are kept in `cache`, or where JAX_COMPILATION_CACHE_DIR says."""
    name, *arguments = command
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache.resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    with log.open("a", encoding="utf-8") as file:
        words = [sys.executable, "-m", f"mefn_jax.commands.{name}", *arguments]
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
    define_path_flag("config", find_config("precomputed"), "Configuration, with optional arguments after a colon.")
    flags.DEFINE_list("models", ["mefn"], "Names of models, separated by commas.")
    flags.DEFINE_list("seeds", ["0"], "Seeds, separated by commas.")
    flags.DEFINE_multi_string(
        "grid", [], "KEY=VALUE,VALUE,...: values of an option, of which all combinations are run; may be repeated."
    )
    flags.DEFINE_string("part", "", "K/N: perform the K-th of N parts of the runs, which N jobs may do at once.")
    define_path_flag("out", None, "Directory of the runs, in subdirectories <model>/<seed>/.")
    flags.DEFINE_string("split", "test", "Split to evaluate after training: val, test or held_out.")


def main(overrides: list[str]) -> None:
    """Runs the command."""
    f = flags.FLAGS
    if not f.out:
        raise ConfigError("--out=DIR is missing: the directory of the runs")
    if is_remote(f.out):
        raise ConfigError(f"--out={f.out}: give a directory on this machine")
    seeds, split, part = parse_seeds(f.seeds), SPLIT_ALIASES.get(f.split, f.split), parse_part(f.part)
    if not all(f.models) or len(set(f.models)) < len(f.models):
        raise ConfigError(f"--models={','.join(f.models)}: give names separated by commas, each once")
    if sweep(Sweep(f.config, f.models, seeds, parse_grid(f.grid), Path(f.out), split, overrides, part)):
        sys.exit(1)


if __name__ == "__main__":
    overrides = [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
    sys.argv = [argument for argument in sys.argv if argument not in overrides]
    run_command(lambda: main(overrides), define_flags)
