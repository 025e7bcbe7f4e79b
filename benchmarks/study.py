"""Runs the study of docs/results.md on precomputed regions, row by row and seed by seed; skips what is finished.

    python benchmarks/study.py --split=held_out --data=REGIONS --words=WORDS --out=DIR [--rows=NAME,...] [--seeds=0,1,2]

REGIONS and WORDS are made as docs/results.md says. Every run is one of `mefn_jax.sweep`, which calls `train.py` and
`eval.py`, in DIR/<split>/<row>/. With `--split=held_out` the last 500 training images are held out and scored: settings
are chosen on them. With `--split=val` all training images are trained on. Finished runs are lines of JSON in
DIR/<split>.jsonl: row, seed, rSum, the six recalls, learned scalars, seconds. All rows get the first seed before any
gets the second.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT_IMAGES = 500


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the study: a system, and its options where they are not those of `configs/precomputed.py`."""

    model: str
    options: dict = dataclasses.field(default_factory=dict)


NO_HUBS = {"matcher.hub_vectors": 0}
REGIONS_9X9 = {"image.regions.grid": 0}
# The learning rates of docs/results.md; the configuration's is MEFN's.
LOW_RATE, HIGH_RATE = {"train.learning_rate": 5e-4}, {"train.learning_rate": 2e-3}
# One layer of MATE's fusion, which takes 11 % of a step's arithmetic; the published six take 66 %.
SMALL_FUSION = {"matcher.layers": 1, "matcher.mlp_width": 512}
ABLATIONS = "mefn_no_entropy", "mefn_no_evidence", "mefn_no_weights", "mefn_no_local", "mefn_no_global"
SCAN_FORMS = "scan_i2t_lse", "scan_i2t_avg", "scan_t2i_lse", "scan_t2i_avg"
SFE_FORMS = "sfe", "sfe_no_external", "sfe_no_internal", "sfe_no_patch", "sfe_no_instance", "sfe_no_neighbour"
VISITA_FORMS = "visita", "visita_no_cross", "visita_one_level", "visita_one_step", "visita_linear"
ROWS = {
    "mefn": Row("mefn"),
    **{name: Row(name) for name in ABLATIONS},
    "vsepp": Row("vsepp", LOW_RATE),
    **{name: Row(name, HIGH_RATE) for name in SCAN_FORMS},
    "mefn_no_hubs": Row("mefn", NO_HUBS),
    "mefn_no_entropy_no_hubs": Row("mefn_no_entropy", NO_HUBS),
    "vsepp_no_hubs": Row("vsepp", LOW_RATE | NO_HUBS),
    "scan_i2t_lse_no_hubs": Row("scan_i2t_lse", HIGH_RATE | NO_HUBS),
    "mefn_shared": Row("mefn", {"matcher.init_evidence_lambda": 0.0}),
    "mefn_gaussian": Row("mefn", {"matcher.entropy": "gaussian", "matcher.init_evidence_lambda": 0.0}),
    "mefn_bernoulli": Row("mefn", {"matcher.entropy": "bernoulli"}),
    "mefn_equal": Row("mefn", {"loss.skip_equal_captions": True}),
    "mefn_9x9": Row("mefn", REGIONS_9X9),
    "mefn_no_entropy_9x9": Row("mefn_no_entropy", REGIONS_9X9),
    "mefn_paper": Row("mefn_paper"),
    "mefn_paper_hubs": Row("mefn_paper", {"matcher.hub_vectors": 1024}),
    "vse_infinity": Row("vse_infinity", LOW_RATE),
    "esa": Row("esa", LOW_RATE | {"loss.name": "sel"}),
    "mate": Row("mate", LOW_RATE | SMALL_FUSION),
    "mate_no_fusion": Row("mate_no_fusion", LOW_RATE),
    **{name: Row(name, LOW_RATE | SMALL_FUSION) for name in ("mate_no_momentum", "mate_no_hect")},
    **{name: Row(name) for name in SFE_FORMS},
    **{name: Row(name, HIGH_RATE) for name in VISITA_FORMS},
}


def run(name: str, seed: int, options: argparse.Namespace) -> None:
    """Trains and evaluates one row with one seed, and appends its line; nothing if the line is there."""
    results = options.out / f"{options.split}.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if any((line["row"], line["seed"]) == (name, seed) for line in lines):
        return
    row, folder, start = ROWS[name], options.out / options.split / name, time.perf_counter()
    changes = row.options | {"data.dir": options.data, "data.cached_text": options.words}
    if options.split == "held_out":
        changes["data.held_out_images"] = HELD_OUT_IMAGES
    command = [sys.executable, "-m", "mefn_jax.sweep", "--config=configs/precomputed.py", f"--models={row.model}"]
    command += [f"--seeds={seed}", f"--split={options.split}", f"--out={folder}"]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    subprocess.run(command, cwd=ROOT, check=True)
    workdir = folder / row.model / str(seed)
    report = json.loads((workdir / "eval" / options.split / "metrics.json").read_text())
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    scalars = {k: round(v, 4) for line in logged for k, v in line.items() if k.startswith(("matcher.", "pairs."))}
    recalls = {f"{side}.{k}": report[side][k] for side in ("i2t", "t2i") for k in ("r1", "r5", "r10")}
    line = {"row": name, "seed": seed, "rsum": report["rsum"]} | recalls | {"scalars": scalars}
    with results.open("a") as file:
        file.write(json.dumps(line | {"seconds": round(time.perf_counter() - start)}) + "\n")


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("held_out", "val"), default="held_out")
    parser.add_argument("--data", required=True, help="folder of the regions, in SCAN's format")
    parser.add_argument("--words", required=True, help="folder that mefn_jax.precompute wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS), help="names of rows, separated by commas")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, options.seeds.split(",")):
        for name in options.rows.split(","):
            run(name, seed, options)


if __name__ == "__main__":
    main()
