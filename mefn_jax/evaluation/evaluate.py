"""Evaluates a model on a split: prints the table of recalls, and writes `metrics.json` and `ranks.npz`.

    python eval.py --workdir=DIR [--split=test] [--step=best|latest|N] [--folds=1,5] [--rerank=0.1] [--certified]

The protocol and the files are described in docs/evaluation.md, the metrics in docs/method.md, section 13. I images, C
captions.
"""

import dataclasses

import numpy as np
from absl import flags
from etils import epath

from mefn_jax import metrics
from mefn_jax.data import statistics
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.digests import digest_gallery, digest_text
from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation import baselines, pointing, twins
from mefn_jax.evaluation import rerank as reranking
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.evaluation.gallery import OpenedGallery, open_split
from mefn_jax.evaluation.results import RESULT_FILES, read_report, write_results
from mefn_jax.evaluation.run import (
    Gallery,
    TrainedRun,
    define_gallery_flags,
    define_run_flags,
    define_scores_flag,
    gallery_from_flags,
    run_from_flags,
)
from mefn_jax.evaluation.score_file import check_outputs, check_score_file, open_score_file
from mefn_jax.evaluation.table import describe_protocol, print_pointing, print_table
from mefn_jax.evaluation.transductive import correct_scores, needs_bank, parse_transductive
from mefn_jax.features import Features
from mefn_jax.runtime.cli import define_path_flag, define_process_flags
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.multihost import check_on_first_process, initialize
from mefn_jax.runtime.provenance import versions
from mefn_jax.scoring.ranking import list_tiles, rank

TOP = 10  # best captions of every image, and best images of every caption, that ranks.npz keeps
UNKNOWN_WARNING = 5.0  # percentage of unknown wordpieces from which on an evaluation warns


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """An evaluated model with its split and its results.

    Attributes:
        evaluator, params: the model.
        split: the split that was scored.
        images, texts: Features of all images and of all captions of the split.
        report: the content of `metrics.json`.
        ranks: the content of `ranks.npz` (see `rank_and_report`).
        folder: the directory of these files; None if they were not written.
    """

    evaluator: Evaluator
    params: dict
    split: Split
    images: Features
    texts: Features
    report: dict
    ranks: dict
    folder: epath.Path | None = None


def evaluate(
    run: TrainedRun,
    gallery: Gallery,
    out: str = "",
    save_scores: str = "",
    rerank: str = "",
    files: dict = RESULT_FILES,
    certified: bool = False,
    transductive: str = "",
) -> EvaluationResult:
    """Evaluates a run's checkpoint on a gallery, prints the table, and writes `metrics.json` and `ranks.npz`.

    The files go into `run.output_dir`. `save_scores`: a file for all scores; `rerank`: if not empty, reranking is
    evaluated too (see `rerank.parse_rerank`). `transductive`: corrections at test time that are evaluated too (see
    `transductive.parse_transductive`). `files`: names of the files that will be written into `out`, each with
    the check that recognizes an own file (`own` of `outputs.check_output_directory`). `certified`: see
    `rank_certified`.
    """
    check_on_first_process(lambda: check_outputs(out, save_scores, gallery, files))
    evaluator, params, step_number = run.load()
    opened = open_split(evaluator, gallery)
    folder = run.output_dir(gallery.split, out)
    if gallery.data_dir and not (opened.is_own and may_replace(folder, opened.split)):
        folder = run.output_dir(gallery.split, out, gallery.data_dir)
    model = evaluator.config.model
    name = f"{model} (step {step_number}{', averaged' if run.is_averaged else ''})"
    result = evaluate_split(evaluator, params, name, gallery, opened, save_scores, rerank, certified, transductive)
    # A comparison does not take averaged parameters for another seed, because `evaluated` differs.
    evaluated = f"{model}, averaged parameters" if run.is_averaged else model
    result.report.update({"step": step_number, "evaluated": evaluated})
    write_results(folder, result.report, result.ranks)
    return dataclasses.replace(result, folder=folder)


def may_replace(folder, split: Split) -> bool:
    """Returns whether the evaluation in a folder, if there is one, is of the same images and captions as a split."""
    try:
        data = read_report(folder / "metrics.json")["data"] or {}
    except FileNotFoundError:
        return True
    except DataError:
        return False
    return data.get("gallery") == digest_gallery(split)


def evaluate_split(
    evaluator: Evaluator,
    params,
    name: str,
    gallery: Gallery,
    opened: OpenedGallery,
    save_scores: str = "",
    rerank: str = "",
    certified: bool = False,
    transductive: str = "",
) -> EvaluationResult:
    """Scores an opened gallery and prints its results under `name` (see `rank_and_report`).

    Drawn scenes get the pointing game too, a `rerank` that is not empty compares reranking with scoring all pairs, and
    a `transductive` that is not empty corrects the scores with the gallery. Raises ConfigError if the folds do not
    divide the images, or if reranking or a correction is not possible, and DataError if a correction needs training
    images that the data set lacks.
    """
    dataset, split, _ = opened
    folds = gallery.folds
    check_folds(folds, split)
    check_on_first_process(lambda: check_score_file(save_scores, gallery, split))
    num_candidates = reranking.parse_rerank(rerank, split.num_images)
    if num_candidates and not evaluator.model.has_tile:
        raise ConfigError(
            f"--rerank: the matcher of model={evaluator.config.model} has neither score_products nor score_tile"
        )
    if num_candidates and 1 not in folds:
        raise ConfigError("--rerank needs the whole gallery: add 1 to --folds")
    if certified:
        check_certified(evaluator, folds, save_scores, num_candidates, transductive)
    corrections = parse_transductive(transductive)
    if corrections and 1 not in folds:
        raise ConfigError("--transductive needs the whole gallery: add 1 to --folds")
    train = dataset.split("train") if needs_bank(corrections) else None
    text = describe_text(evaluator, split)
    images, texts = evaluator.encode(params, split)
    scores = evaluator.scores(params, images, texts)
    first = rank_certified(evaluator, params, images, texts, split) if certified else None
    if num_candidates:  # compiles the scoring program first, so that the time of ranking is without compilation
        scores(*list_tiles(split.num_images, split.caption_image, 1)[0])
    report, ranks = rank_and_report(evaluator, scores, name, dataset, split, folds, save_scores, first)
    report["data"] |= text
    report["config"] = evaluator.config.to_dict()
    if "baselines" in report:  # drawn scenes
        report["pointing"] = pointing.pointing_accuracy(evaluator, params, images, texts, split)
        print_pointing(report["pointing"])
    if num_candidates:
        exhaustive = (report if folds[0] == 1 else report["other_folds"]["1"]) | {"seconds": report["seconds"]}
        report["rerank"] = reranking.compare_reranking(
            evaluator, params, images, texts, split, num_candidates, exhaustive
        )
        reranking.print_reranking(report["rerank"])
    if corrections:
        results = correct_scores(evaluator, params, images, texts, split, train, corrections)
        report["transductive"] = results
        rows = {f"{key} {result['strength']:g} (transductive)": (result, None) for key, result in results.items()}
        print_table(rows, describe_protocol(evaluator.config, split, 1, evaluator.tokenizer), split, 1)
    return EvaluationResult(evaluator, params, split, images, texts, report, ranks)


def check_certified(evaluator: Evaluator, folds, save_scores: str, num_candidates: int, transductive: str) -> None:
    """Raises ConfigError unless a model can be ranked by certificate, of the whole gallery and nothing else."""
    if not evaluator.model.has_bound:
        raise ConfigError(f"--certified: the matcher of model={evaluator.config.model} has no bound of its scores")
    if tuple(folds) != (1,) or save_scores or num_candidates or transductive:
        raise ConfigError(
            "--certified scores some pairs of the whole gallery: leave out --folds, --rerank, --save_scores and "
            "--transductive"
        )


def rank_certified(evaluator: Evaluator, params, images: Features, texts: Features, split: Split):
    """Returns the Ranking of the TOP first results of every query, which are those of all pairs, and the shares of all
    pairs that were scored (`Evaluator.rank_first`), and prints these. None if that takes more than half of the pairs:
    then all are to be scored."""
    first = evaluator.rank_first(params, images, texts, split.caption_image, TOP)
    if first is None:
        print0("certified: more than half of all pairs can be among the first results; all pairs are scored")
        return None
    ranking, (by_captions, by_images) = first
    print0(
        f"certified: the first {TOP} results of every query are those of all pairs; scored for the captions' rankings "
        f"{100 * by_captions:.1f} % of the pairs, for the images' {100 * by_images:.1f} % besides, in "
        f"{ranking.seconds:.1f} s"
    )
    return first


def describe_text(evaluator: Evaluator, split: Split) -> dict:
    """Returns the digest of the tokenizer, and the percentage of the split's wordpieces that it does not know.

    The percentage is printed, from UNKNOWN_WARNING on with a warning. Both are None for cached text.
    """
    if split.cached_text:
        return {"tokenizer": None, "unknown_wordpieces": None}
    captions = [caption for _, of_image in split.ids_and_captions for caption in of_image]
    return describe_captions(evaluator, captions, split.name)


def describe_captions(evaluator: Evaluator, captions: list[str], name: str) -> dict:
    """Returns the digest of the tokenizer, and the percentage of the captions' wordpieces that it does not know, and
    prints it (see `describe_text`); the printed line calls the captions `name`."""
    tokenizer = evaluator.tokenizer
    lengths, unknown = statistics.count_wordpieces(captions, tokenizer)
    percent = 100 * float(unknown.sum() / max(1, lengths.sum()))
    mark = "warning: " if percent >= UNKNOWN_WARNING else ""
    print0(f"{mark}{percent:.1f} % of the wordpieces of {name} are unknown to the model")
    return {"tokenizer": digest_text(tokenizer.json), "unknown_wordpieces": percent}


def check_folds(folds: tuple[int, ...], split: Split) -> None:
    """Raises ConfigError unless the numbers of folds divide the images; notes if folds are not the published ones."""
    for number in folds:
        if split.num_images % number:
            raise ConfigError(f"--folds={number}: does not divide the {split.num_images} images of {split.name}")
    if max(folds) > 1 and not split.source_order:
        print0("note: TFDS stores images in the order of a hash; these folds are not those of the published COCO 1K")


def rank_and_report(
    evaluator: Evaluator,
    scores,
    name: str,
    dataset: Dataset,
    split: Split,
    folds=(1,),
    save_scores: str = "",
    first: tuple | None = None,
) -> tuple[dict, dict]:
    """Ranks a split by `scores`, prints the table, and returns the report and the ranks.

    `name`: the system's row in the table. `folds`: numbers of folds to average over; the report is about the first.
    `save_scores`: a file for all scores. `first`: what `rank_certified` returned, in place of `scores`; metrics of
    whole rankings are then missing, ranks after TOP are TOP + 1, and twins are not told apart. The report lacks
    `evaluated` (the system, by the name that a comparison gives it) and `config` (its options), which the caller adds;
    `data` has the digest of the gallery.

    Ranks: `i2t (I,)`, `t2i (C,)`, `caption_image (C,)`, `positive_scores (C,)`, and the TOP best results of every
    query, `i2t_top`, `t2i_top`, with their scores, `i2t_top_scores`, `t2i_top_scores`.
    """
    config = evaluator.config
    if split.skipped:
        print0(f"left out {len(split.skipped)} images that cannot be decoded: {', '.join(split.skipped[:5])}")
    if first is None:
        with open_score_file(save_scores, split) as score_file:
            ranking = rank(scores, split.caption_image, folds, TOP, show_progress=True, save_to=score_file)
    else:
        ranking, shares = first
    results = {number: fold_metrics(ranking.counts[number], split, number) for number in folds}
    if first is not None:
        results = {number: (metrics.keep_recalls(result), ranks) for number, (result, ranks) in results.items()}
    rows = {name: results[folds[0]]}
    scene_twins = twins.find_twins(split) if folds[0] == 1 and first is None else None
    if scene_twins:
        baseline_scores = {
            "caption words": baselines.caption_word_overlap(split),
            "color histogram": baselines.color_histogram(dataset.split("train"), split),
        }
        rows |= {
            key: fold_metrics(rank(baseline, split.caption_image).counts[1], split, 1)
            for key, baseline in baseline_scores.items()
        }
        for (result, _), row_scores in zip(rows.values(), [scores, *baseline_scores.values()], strict=True):
            result["twins"] = twins.twin_accuracy(scene_twins, row_scores)
    report, ranks = rows[name]
    report |= {"protocol": describe_protocol(config, split, folds[0], evaluator.tokenizer)}
    if scene_twins:
        report["protocol"]["ambiguous_captions"] = 100.0 * scene_twins.shared
        report["baselines"] = {key: result for key, (result, _) in list(rows.items())[1:]}
    print_table(rows, report["protocol"], split, folds[0])
    for number in folds[1:]:
        print_table(
            {name: results[number]}, describe_protocol(config, split, number, evaluator.tokenizer), split, number
        )
        report.setdefault("other_folds", {})[str(number)] = results[number][0]
    report |= {"seconds": ranking.seconds, "versions": versions(), "data": {"gallery": digest_gallery(split)}}
    if first is not None:
        report["certified"] = {"first": TOP, **dict(zip(("captions_share", "images_share"), shares, strict=True))}
    top_results = {"i2t": ranking.top_captions, "t2i": ranking.top_images}
    top_arrays = {f"{side}_top": top.positions for side, top in top_results.items()}
    top_arrays |= {f"{side}_top_scores": top.scores for side, top in top_results.items()}
    pairs = {"caption_image": split.caption_image, "positive_scores": ranking.positive_scores}
    return report, ranks | pairs | top_arrays


def fold_metrics(counts, split: Split, folds: int) -> tuple[dict, dict]:
    """Returns the metrics averaged over consecutive folds of the images, and the ranks within the folds.

    `counts`: `(n_i2t, n_t2i)` of `scoring.ranking.rank`. Ranks: `{"i2t": (I,), "t2i": (C,)}`.
    """
    size, results, ranks = split.num_images // folds, [], []
    for first_image in range(0, split.num_images, size):
        captions = slice(int(split.caption_offsets[first_image]), int(split.caption_offsets[first_image + size]))
        fold = *(n[captions] for n in counts), split.caption_image[captions] - first_image
        results.append(metrics.retrieval_metrics(*fold))
        ranks.append(metrics.best_ranks(*fold))
    i2t, t2i = (np.concatenate(r) for r in zip(*ranks, strict=True))
    return metrics.average_metrics(results), {"i2t": i2t, "t2i": t2i}


def define_flags() -> None:
    """Defines the flags of the command."""
    define_run_flags()
    define_gallery_flags()
    flags.DEFINE_string(
        "rerank", "", "Evaluate reranking too, with this number of candidates for a caption, or share of the images."
    )
    flags.DEFINE_bool(
        "certified",
        False,
        "Score only pairs that can be among a query's first ten: R@1, 5 and 10 are those of all pairs.",
    )
    flags.DEFINE_string(
        "transductive",
        "",
        "Evaluate corrections by the gallery too: csls, dual_softmax, querybank, each with :STRENGTH if wanted.",
    )
    define_scores_flag()
    define_path_flag("out", "", "Directory of the results; default: WORKDIR/eval/<split>, with --ema <split>_ema.")
    define_process_flags()


def main() -> None:
    """Runs the command."""
    f = flags.FLAGS
    initialize()
    options = {"certified": f.certified, "transductive": f.transductive}
    evaluate(run_from_flags(), gallery_from_flags(), f.out, f.save_scores, f.rerank, **options)
