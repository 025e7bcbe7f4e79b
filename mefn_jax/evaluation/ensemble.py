"""Evaluates several runs as one system, by the mean of their scores (`eval.py --ensemble`)."""

import dataclasses

import numpy as np

from mefn_jax.config import require_local
from mefn_jax.data.split import SPLIT_ALIASES
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.evaluate import check_folds, open_split, rank_and_report, write_results
from mefn_jax.evaluation.evaluator import load_checkpoint
from mefn_jax.runtime.storage import resolve_directory


def evaluate_ensemble(
    workdirs: list[str], data_dir: str, split: str, step: str, folds, out: str, save_scores=""
) -> dict:
    """Evaluates the mean of several runs' scores like one system, writes the results into `out` and returns the report.

    The arguments are those of `evaluate.evaluate`. Raises ConfigError if the runs have different images or captions in
    the split.
    """
    out = resolve_directory("--out", out)
    require_local("--data_dir", data_dir)
    scores_of_runs, caption_image = [], None
    for workdir in workdirs:
        evaluator, params, _ = load_checkpoint(resolve_directory("--ensemble", workdir), step)
        dataset, opened_split = open_split(evaluator, data_dir, SPLIT_ALIASES.get(split, split))
        caption_image = opened_split.caption_image if caption_image is None else caption_image
        if not np.array_equal(opened_split.caption_image, caption_image):
            raise ConfigError(f"--ensemble={workdir}: has other images and captions in {split} than {workdirs[0]}")
        scores_of_runs.append(evaluator.scores(params, *evaluator.encode(params, opened_split)))
    evaluator.config.model = f"ensemble of {len(scores_of_runs)}"
    check_folds(folds, opened_split)
    report, ranks = rank_and_report(
        evaluator, MeanScores(scores_of_runs), "scores averaged", dataset, opened_split, folds, save_scores
    )
    report["config"] = {"model": evaluator.config.model, "runs": sorted(map(str, workdirs))}
    write_results(out, report, ranks)
    return report


@dataclasses.dataclass
class MeanScores:
    """Mean of several `tiles.Scores`: a `tiles.Scores` itself."""

    parts: list

    def __call__(self, rows: slice, columns: slice) -> np.ndarray:
        return np.mean([scores(rows, columns) for scores in self.parts], 0)
