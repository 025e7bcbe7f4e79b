"""Evaluates several runs as one system, by the mean of their scores.

    python eval.py ensemble DIR DIR ... --out=DIR [--split=test] [--folds=1,5]

All runs must have the same images and captions in the split (docs/evaluation.md).
"""

import dataclasses

import numpy as np
from absl import flags

from mefn_jax.data.digests import digest_gallery
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.evaluate import check_folds, describe_text, rank_and_report
from mefn_jax.evaluation.gallery import open_split
from mefn_jax.evaluation.results import write_results
from mefn_jax.evaluation.run import (
    Gallery,
    TrainedRun,
    define_checkpoint_flags,
    define_gallery_flags,
    define_scores_flag,
    gallery_from_flags,
)
from mefn_jax.evaluation.score_file import check_outputs, check_score_file
from mefn_jax.runtime.cli import define_path_flag, define_process_flags
from mefn_jax.runtime.multihost import check_on_first_process, initialize
from mefn_jax.runtime.storage import resolve_directory


def evaluate_ensemble(runs: list[TrainedRun], gallery: Gallery, out: str, save_scores: str = "") -> dict:
    """Evaluates the mean of several runs' scores like one system, writes the results into `out` and returns the report.

    Raises ConfigError if the runs have different images or captions in the split.
    """
    check_on_first_process(lambda: check_outputs(out, save_scores, gallery))
    loaded, digest = [], ""
    for run in runs:
        evaluator, params, _ = run.load()
        dataset, split, _ = open_split(evaluator, gallery)
        own_digest = digest_gallery(split)
        digest = digest or own_digest
        if own_digest != digest:
            raise ConfigError(f"{run.workdir}: has other images or captions in {split.name} than {runs[0].workdir}")
        loaded.append((evaluator, params, split))
    check_folds(gallery.folds, split)
    check_on_first_process(lambda: check_score_file(save_scores, gallery, split))
    scores_of_runs = []
    for evaluator, params, own_split in loaded:
        describe_text(evaluator, own_split)
        scores_of_runs.append(evaluator.scores(params, *evaluator.encode(params, own_split)))
    evaluated = f"ensemble of {len(runs)}"
    report, ranks = rank_and_report(
        evaluator,
        MeanScores(scores_of_runs),
        f"{evaluated} (scores averaged)",
        dataset,
        split,
        gallery.folds,
        save_scores,
    )
    report |= {"evaluated": evaluated, "config": {"runs": sorted(map(describe_run, runs))}}
    write_results(resolve_directory("--out", out), report, ranks)
    return report


@dataclasses.dataclass
class MeanScores:
    """Mean of several `tiles.Scores`: a `tiles.Scores` itself."""

    parts: list

    def __call__(self, rows: slice, columns: slice) -> np.ndarray:
        return np.mean([scores(rows, columns) for scores in self.parts], 0)


def describe_run(run: TrainedRun) -> str:
    """Returns the workdir of a run, its checkpoint unless it is the best one, and whether the parameters are averaged,
    by `--ema` or by an export."""
    parts = ["" if run.step == "best" else f", step {run.step}", ", averaged parameters" if run.is_averaged else ""]
    return str(run.workdir) + "".join(parts)


def define_flags() -> None:
    """Defines the flags of the command."""
    define_checkpoint_flags()
    define_gallery_flags()
    define_scores_flag()
    define_path_flag("out", None, "Directory for metrics.json and ranks.npz.", required=True)
    define_process_flags()


def main(workdirs: list[str]) -> None:
    """Runs the command."""
    f = flags.FLAGS
    if not workdirs:
        raise ConfigError("no runs are named: python eval.py ensemble DIR DIR --out=DIR")
    initialize()
    runs = [TrainedRun(workdir, f.step, f.ema) for workdir in workdirs]
    evaluate_ensemble(runs, gallery_from_flags(), f.out, f.save_scores)
