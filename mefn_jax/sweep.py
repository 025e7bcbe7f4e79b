"""Trains and evaluates several models and seeds, one after the other; skips the runs that are finished.

    python -m mefn_jax.sweep --config=FILE.py --models=mefn,vsepp --seeds=0,1,2 --out=DIR [--split=val] \\
        [--config.key=value ...]

Each run calls `train.py` and `eval.py` as a user would, in DIR/<model>/<seed>/, and writes their output to `log.txt`
there. If a run fails, its error is printed and the others go on; the same command tries it again from its latest
checkpoint.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from mefn_jax.data.split import SPLIT_ALIASES
from mefn_jax.errors import ConfigError
from mefn_jax.runtime.cli import run_command
from mefn_jax.runtime.console import format_duration

ROOT = Path(__file__).resolve().parent.parent


def sweep(config: str, models: list[str], seeds: list[int], out: Path, split: str, overrides: list[str]) -> int:
    """Performs the missing runs and prints one line for each run. `config` is a file with arguments; `overrides` are
    flags that `train.py` gets in addition. Returns the number of failed runs."""
    failed = 0
    for model in models:
        for seed in seeds:
            workdir = out / model / str(seed)
            report, start = workdir / "eval" / split / "metrics.json", time.perf_counter()
            name = f"{model} seed {seed}"
            if report.is_file():
                print(f"{name}: {recall_line(report, split)} (already done)", flush=True)
                continue
            workdir.mkdir(parents=True, exist_ok=True)
            run_config = f"{config}{',' if ':' in config else ':'}model={model}"
            commands = (
                [
                    "train.py",
                    f"--config={run_config}",
                    f"--workdir={workdir}",
                    f"--config.train.seed={seed}",
                    *overrides,
                ],
                ["eval.py", f"--workdir={workdir}", f"--split={split}"],
            )
            if all(_succeeds(command, workdir / "log.txt") for command in commands):
                duration = format_duration(time.perf_counter() - start)
                print(f"{name}: {recall_line(report, split)} ({duration})", flush=True)
            else:
                failed += 1
                print(f"{name}: failed, {last_line(workdir / 'log.txt')}; see {workdir / 'log.txt'}", flush=True)
    return failed


def _succeeds(command: list[str], log: Path) -> bool:
    """Runs a command of the checkout in the current directory, appends its output to `log`, and returns whether it
    succeeded."""
    script, *arguments = command
    with log.open("a", encoding="utf-8") as file:
        return subprocess.run([sys.executable, ROOT / script, *arguments], stdout=file, stderr=file).returncode == 0


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
    flags.DEFINE_string("out", None, "Directory of the runs, in subdirectories <model>/<seed>/.")
    flags.DEFINE_string("split", "test", "Split to evaluate after training: val, test or held_out.")


def main(overrides: list[str]) -> None:
    """Runs the command."""
    f = flags.FLAGS
    if not f.out:
        raise ConfigError("--out=DIR is missing: the directory of the runs")
    seeds = f.seeds
    if not all(seed.isdigit() for seed in seeds):
        raise ConfigError(f"--seeds={','.join(seeds)}: give numbers separated by commas")
    split = SPLIT_ALIASES.get(f.split, f.split)
    if sweep(f.config, f.models, list(map(int, seeds)), Path(f.out), split, overrides):
        sys.exit(1)


if __name__ == "__main__":
    overrides = [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
    sys.argv = [argument for argument in sys.argv if argument not in overrides]
    run_command(lambda: main(overrides), define_flags)
