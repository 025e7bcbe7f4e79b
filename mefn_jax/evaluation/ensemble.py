"""TODO."""

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
    """Evaluates the average of several runs' score matrices, as one system; otherwise as `evaluate`, into `out`."""
    out = resolve_directory("--out", out)
    require_local("--data_dir", data_dir)
    parts, owners = [], None
    for workdir in workdirs:
        evaluator, params, _ = load_checkpoint(resolve_directory("--ensemble", workdir), step)
        dataset, opened_split = open_split(evaluator, data_dir, SPLIT_ALIASES.get(split, split))
        owners = opened_split.caption_image if owners is None else owners
        if not np.array_equal(opened_split.caption_image, owners):
            raise ConfigError(f"--ensemble={workdir}: has other images and captions in {split} than {workdirs[0]}")
        parts.append(evaluator.scores(params, *evaluator.encode(params, opened_split)))
    evaluator.config.model = f"ensemble of {len(parts)}"
    check_folds(folds, opened_split)
    report, ranks = rank_and_report(
        evaluator, MeanScores(parts), "scores averaged", dataset, opened_split, folds, save_scores
    )
    report["config"] = {"model": evaluator.config.model, "runs": sorted(map(str, workdirs))}
    write_results(out, report, ranks)
    return report


@dataclasses.dataclass
class MeanScores:
    """`tiled.Scores`: the mean of several."""

    parts: list

    def __call__(self, rows: slice, columns: slice) -> np.ndarray:
        return np.mean([scores(rows, columns) for scores in self.parts], 0)
