"""Runs the study of mined hard negatives of docs/results.md on the drawn scenes, one run at a time; can be resumed.

    python benchmarks/hard_negatives.py first   --seed=0 --out=DIR
    python benchmarks/hard_negatives.py without --seed=0 --out=DIR
    python benchmarks/hard_negatives.py with    --seed=0 --out=DIR
    python benchmarks/hard_negatives.py table   --out=DIR

Both rows of a seed go on from one run, `first`, of half of the steps: `without` with batches as before, `with` with the
negatives that this run mines. So they differ in the batches of the second half alone. Neither puts twins into one batch
by their ground truth (`data.pair_twins`). A row performs `first` if it is missing; run both rows of a seed at the same
time only when `first` is finished. Each run needs one core (`taskset -c 0 python ...`). `--smoke` shows the whole path
with tiny sizes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
STEPS = {False: (750, 1500), True: (4, 8)}  # half and whole, without and with --smoke; those of configs/shapes.py
NEGATIVES = "hard.safetensors"  # relative, so that the configurations of all seeds are the same
ROWS = {"without": (), "with": (f"--config.data.negatives={NEGATIVES}",)}


def call(script: str, *arguments: str, folder: Path) -> None:
    """Calls a command of the project in a folder. Raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=folder, check=True)


def train(workdir: Path, seed: int, steps: int, smoke: bool, *options: str) -> None:
    """Trains to a number of steps, from the latest checkpoint of the workdir if it has one."""
    every = STEPS[smoke][0] // 2
    options = (f"--config.train.steps={steps}", f"--config.train.seed={seed}", *options)
    options += ("--config.data.scene_seed=1", "--config.data.pair_twins=False", "--config.eval.explained_pairs=0")
    options += (f"--config.train.eval_every={every}", f"--config.train.save_every={every}")
    config = f"--config={ROOT / 'configs' / 'shapes.py'}{':smoke' * smoke}"
    call("train.py", config, f"--workdir={workdir.name}", *options, folder=workdir.parent)


def run(row: str, seed: int, out: Path, smoke: bool) -> None:
    """Performs a row of one seed, or the run that both begin with; nothing if it is finished."""
    folder, (half, whole) = out / str(seed), STEPS[smoke]
    folder.mkdir(parents=True, exist_ok=True)
    first, workdir = folder / "first", folder / row
    if not (first / "checkpoints" / str(half) / "rsum.json").is_file():
        train(first, seed, half, smoke)
    if row == "first" or (workdir / "eval" / "test" / "metrics.json").is_file():
        return
    if row == "with" and not (folder / NEGATIVES).is_file():
        call("eval.py", "mine", "--workdir=first", f"--step={half}", f"--out={NEGATIVES}", folder=folder)
    if not workdir.is_dir():
        copy = folder / f".{row}.new"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(first, copy)
        os.replace(copy, workdir)
    train(workdir, seed, whole, smoke, *ROWS[row])
    call("eval.py", f"--workdir={row}", "--split=test", folder=folder)


def print_table(out: Path) -> None:
    """Prints rSum and twin accuracy of every finished run on test, their means and deviations over the seeds."""
    seeds = sorted(int(path.name) for path in out.iterdir() if path.name.isdigit())
    titles = ["row", "", *(f"seed {seed}" for seed in seeds), "mean ± deviation"]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for row in ROWS:
        paths = [out / str(seed) / row / "eval" / "test" / "metrics.json" for seed in seeds]
        reports = [json.loads(path.read_text()) if path.is_file() else None for path in paths]
        for name, read in (("rSum", lambda r: r["rsum"]), ("twins", lambda r: r["twins"]["all"])):
            values = [read(report) for report in reports if report]
            cells = [f"{read(report):.1f}" if report else "" for report in reports]
            mean = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            print(f"| {row} | {name} | {' | '.join(cells)} | {mean} |")


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=("first", *ROWS, "table"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    out = options.out.resolve()
    print_table(out) if options.row == "table" else run(options.row, options.seed, out, options.smoke)


if __name__ == "__main__":
    main()
