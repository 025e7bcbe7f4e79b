"""Evaluates a trained model on a split (DESIGN.md 8): the table of recalls, `metrics.json` and `ranks.npz`."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import jax
import numpy as np
from etils import epath

from mefn_jax import metrics
from mefn_jax.config import require_local
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.from_config import fill_data_widths, open_dataset
from mefn_jax.data.split import SPLIT_ALIASES, Split
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation import baselines, pointing, twins
from mefn_jax.evaluation import rerank as reranking
from mefn_jax.evaluation.evaluator import Evaluator, load_checkpoint, load_zero_shot
from mefn_jax.evaluation.table import describe_protocol, print_pointing, print_table
from mefn_jax.features import Features
from mefn_jax.runtime.checkpoint import versions
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.storage import resolve_directory, write_atomic
from mefn_jax.scoring.ranking import list_tiles, rank

TOP = 10  # captions of every image, and images of every caption, that are kept


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """An evaluated model, and what it was evaluated on.

    Attributes:
        evaluator, params: the model.
        split: what was scored; `images`, `texts` are its Features.
        report: what `metrics.json` holds.
        ranks: what `ranks.npz` holds (see `ranked`).
    """

    evaluator: Evaluator
    params: dict
    split: Split
    images: Features
    texts: Features
    report: dict
    ranks: dict


def evaluate(
    workdir, data_dir: str, split: str, step: str, folds=(1,), out="", ema=False, save_scores="", rerank=""
) -> EvaluationResult:
    """Evaluates a workdir's checkpoint on a split, prints the table, and writes `metrics.json` and `ranks.npz` into
    `folder_of(workdir, split, out, ema)`. `save_scores` names a file for all scores; `rerank` asks for shortlists too
    (`two_stage.shortlisted`)."""
    workdir, folder = resolve_directory("--workdir", workdir), output_dir(workdir, split, out, ema)
    require_local("--data_dir", data_dir)
    evaluator, params, number = load_checkpoint(workdir, step, ema)
    title = f"step {number}{', averaged' if ema else ''}"
    found = evaluate_split(
        evaluator, params, title, data_dir, SPLIT_ALIASES.get(split, split), folds, save_scores, rerank
    )
    found.report["step"] = number
    if ema:  # so that a comparison does not take it for another seed
        found.report["config"]["evaluated"] = "averaged parameters"
    write_results(folder, found.report, found.ranks)
    return found


def output_dir(workdir, split: str, out: str = "", ema: bool = False) -> epath.Path:
    """Where an evaluation goes: `out`, or `WORKDIR/eval/<split>/`, that of averaged parameters `<split>_ema`."""
    folder = resolve_directory("--workdir", workdir) / "eval" / (SPLIT_ALIASES.get(split, split) + "_ema" * ema)
    return resolve_directory("--out", out) if out else folder


def zero_shot(config, data_dir: str, split: str, folds=(1,), out: str = "", save_scores="") -> dict:
    """Evaluates the pretrained towers that a configuration names, without training (see `evaluator.untrained`). Prints
    the table, and writes as `evaluate` does if `out` is given."""
    out = out and resolve_directory("--out", out)
    require_local("--data_dir", data_dir)
    require_local("data.dir", config.data.dir)
    evaluator, params = load_zero_shot(config)
    found = evaluate_split(
        evaluator, params, "zero-shot", data_dir, SPLIT_ALIASES.get(split, split), folds, save_scores
    )
    if out:
        write_results(out, found.report, found.ranks)
    return found.report


def open_split(evaluator: Evaluator, data_dir: str, split_name: str) -> tuple[Dataset, Split]:
    """The data set, of `data_dir` or as configured, and a split that the model can take."""
    config = evaluator.config
    if data_dir:
        config.data.dir = data_dir
    dataset = open_dataset(config)
    split = dataset.split(split_name)
    fill_data_widths(config, split)
    return dataset, split


def evaluate_split(
    evaluator: Evaluator, params, title: str, data_dir: str, split_name: str, folds, save_scores="", rerank=""
) -> EvaluationResult:
    """Scores a split, of `data_dir` or of the configured data; else as `ranked`."""
    dataset, split = open_split(evaluator, data_dir, split_name)
    check_folds(folds, split)
    listed = reranking.parse_rerank(rerank, split.num_images)
    if listed and not evaluator.model.has_tile:
        raise ConfigError(f"--rerank: the matcher of model={evaluator.config.model} has no tile to score pairs with")
    if listed and 1 not in folds:
        raise ConfigError("--rerank needs the whole gallery: add 1 to --folds")
    images, texts = evaluator.encode(params, split)
    scores = evaluator.scores(params, images, texts)
    if listed:  # what is timed is not compiled meanwhile
        scores(*list_tiles(split.num_images, split.caption_image, 1)[0])
    report, ranks = rank_and_report(evaluator, scores, title, dataset, split, folds, save_scores)
    if "baselines" in report:  # drawn scenes
        report["pointing"] = pointing.pointing_accuracy(evaluator, params, images, texts, split)
        print_pointing(report["pointing"])
    if listed:
        whole = (report if folds[0] == 1 else report["other_folds"]["1"]) | {"seconds": report["seconds"]}
        report["rerank"] = reranking.compare_reranking(evaluator, params, images, texts, split, listed, whole)
        reranking.print_reranking(report["rerank"])
    return EvaluationResult(evaluator, params, split, images, texts, report, ranks)


def check_folds(folds: tuple[int, ...], split: Split) -> None:
    """Raises ConfigError unless the folds divide the images; says so where they are not the published ones."""
    for number in folds:
        if split.num_images % number:
            raise ConfigError(f"--folds={number}: does not divide the {split.num_images} images of {split.name}")
    if max(folds) > 1 and not split.source_order:
        print0("note: TFDS stores images in the order of a hash; these folds are not those of the published COCO 1K")


def rank_and_report(
    evaluator: Evaluator, scores, title: str, dataset: Dataset, split: Split, folds=(1,), save_scores=""
) -> tuple[dict, dict]:
    """Ranks a split by `scores` and prints the table. `folds` are numbers of folds, of which the first is what the
    report is of; `save_scores` names a file for all scores. Returns the report and the ranks: `{i2t (I,), t2i (C,),
    caption_image (C,)}`, the captions' scores with their own image, `positive_scores`, and the TOP best of every query,
    `i2t_top`, `t2i_top` and their scores."""
    config, name = evaluator.config, f"{evaluator.config.model} ({title})"
    if split.skipped:
        print0(f"left out {len(split.skipped)} images that cannot be decoded: {', '.join(split.skipped[:5])}")
    if save_scores and 1 not in folds:
        raise ConfigError("--save_scores needs the whole gallery: add 1 to --folds")
    with open_score_file(save_scores, split) as whole:
        found = rank(scores, split.caption_image, folds, TOP, bar=True, save_to=whole)
    results = {number: fold_metrics(found.counts[number], split, number) for number in folds}
    rows = {name: results[folds[0]]}
    known = twins.find_twins(split) if folds[0] == 1 else None
    if known:
        others = {
            "caption words": baselines.caption_word_overlap(split),
            "colour histogram": baselines.color_histogram(dataset.split("train"), split),
        }
        rows |= {
            key: fold_metrics(rank(other, split.caption_image).counts[1], split, 1) for key, other in others.items()
        }
        for (result, _), scoring in zip(rows.values(), [scores, *others.values()], strict=True):
            result["twins"] = twins.twin_accuracy(known, scoring)
    report, ranks = rows[name]
    report |= {"protocol": describe_protocol(config, split, folds[0])}
    if known:
        report["protocol"]["ambiguous_captions"] = 100.0 * known.shared
        report["baselines"] = {key: result for key, (result, _) in list(rows.items())[1:]}
    print_table(rows, report["protocol"], split, folds[0])
    for number in folds[1:]:
        print_table({name: results[number]}, describe_protocol(config, split, number), split, number)
        report.setdefault("other_folds", {})[str(number)] = results[number][0]
    report |= {"seconds": found.seconds, "config": config.to_dict(), "versions": versions()}
    best = {"i2t": found.top_captions, "t2i": found.top_images}
    tops = {f"{side}_top": b.positions for side, b in best.items()}
    tops |= {f"{side}_top_scores": b.scores for side, b in best.items()}
    return report, ranks | {"caption_image": split.caption_image, "positive_scores": found.positive_scores} | tops


@contextlib.contextmanager
def open_score_file(path, split: Split):
    """A float32 array `(I, C)` on disk at `path`, a .npy file, which appears when all is well; None without a path or
    on another process."""
    if not path or jax.process_index():
        yield None
        return
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(part, "w+", np.float32, (split.num_images, split.num_captions))
    except OSError as e:
        raise ConfigError(f"--save_scores={path}: cannot be written ({e})") from e
    try:
        yield array
        array.flush()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print0(f"wrote {path}: scores float32 {split.num_images} x {split.num_captions}, images by captions")


def fold_metrics(counts, split: Split, folds: int) -> tuple[dict, dict]:
    """Metrics averaged over consecutive folds of the images, and the ranks inside the folds `{i2t (I,), t2i (C,)}`."""
    size, results, ranks = split.num_images // folds, [], []
    for first in range(0, split.num_images, size):
        part = slice(int(split.caption_offsets[first]), int(split.caption_offsets[first + size]))
        inside = *(n[part] for n in counts), split.caption_image[part] - first
        results.append(metrics.retrieval_metrics(*inside))
        ranks.append(metrics.best_ranks(*inside))
    i2t, t2i = (np.concatenate(r) for r in zip(*ranks, strict=True))
    return metrics.average_metrics(results), {"i2t": i2t, "t2i": t2i}


def write_results(folder: epath.Path, report: dict, ranks: dict) -> None:
    if jax.process_index():
        return
    arrays = io.BytesIO()
    np.savez(arrays, **ranks)
    try:
        write_atomic(folder / "metrics.json", json.dumps(report, indent=1).encode())
        write_atomic(folder / "ranks.npz", arrays.getvalue())
    except OSError as e:
        raise DataError(f"{folder}: cannot be written ({e})") from e
    print0(f"wrote {folder}/metrics.json and ranks.npz")
