"""Evaluates a run and writes a page about it, `report.html`, which needs no other file.

    python eval.py report --workdir=DIR [--split=test]

I images, C captions.
"""

import io
import json

import jax
import numpy as np
from absl import flags
from etils import epath
from PIL import Image, ImageOps

from mefn_jax import config as configuration
from mefn_jax import metrics
from mefn_jax.benchmarks.caption_groups import group_by_length
from mefn_jax.benchmarks.scorer import Scorer
from mefn_jax.benchmarks.table import make_entries, make_table
from mefn_jax.benchmarks.tasks.diagnose import Answers, Diagnosis, diagnose, embed_items
from mefn_jax.data.images import to_rgb
from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError, reason
from mefn_jax.evaluation import evaluate
from mefn_jax.evaluation.evaluate import EvaluationResult
from mefn_jax.evaluation.results import RESULT_FILES, is_number
from mefn_jax.evaluation.run import Gallery, TrainedRun, gallery_from_flags, run_from_flags
from mefn_jax.reports import charts, explanation, figures, pages
from mefn_jax.reports.contact_sheet import is_own_picture
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.multihost import initialize
from mefn_jax.runtime.storage import write_atomic

QUERIES_SHOWN = 4  # best queries, and worst queries, of each direction
RESULTS_SHOWN = 5  # results of each query
PAIRS_EXPLAINED = 3  # pairs of which the page has an explanation
THUMBNAIL_PIXELS = 150  # pixels of a photograph's longer side


_FIGURES = ("curves", "scores", "lengths", *(f"explained_{k}" for k in range(1, PAIRS_EXPLAINED + 1)))
# The files that the command writes into `--out`, and how existing ones are recognized.
REPORT_FILES = (
    RESULT_FILES | {"report.html": pages.is_page} | {f"report/{name}.png": is_own_picture for name in _FIGURES}
)


def write_report(
    run: TrainedRun, gallery: Gallery, out: str = "", save_scores: str = "", rerank: str = ""
) -> epath.Path:
    """Evaluates a run (see `evaluate.evaluate`), writes `report.html` beside `metrics.json`, and its figures in
    `report/`.

    Returns the path of the page. Raises ConfigError if ranks within folds would be mixed with results of the whole
    gallery.
    """
    if len(gallery.folds) > 1 and gallery.folds[0] != 1:
        raise ConfigError("the report is about the first of --folds: put 1 first, or give one number")
    result = evaluate.evaluate(run, gallery, out, save_scores, rerank, REPORT_FILES)
    folder, pairs, diagnosis = result.folder, explain_examples(result), diagnose_result(result)
    if jax.process_index():
        return folder / "report.html"
    figure_files = draw_figures(result, pairs, read_metrics_log(run.directory))
    page = render(result, figure_files, str(run.workdir), diagnosis, pairs)
    try:
        for name, data in figure_files.items():
            write_atomic(folder / "report" / f"{name}.png", data)
        write_atomic(folder / "report.html", page.encode())
    except OSError as e:
        raise ConfigError(f"{folder}: cannot be written ({e})") from None
    for sentence in diagnosis.sentences:
        print0(sentence)
    print0(f"wrote {folder}/report.html ({len(page) / 1e6:.1f} MB) and its pictures in {folder}/report/")
    return folder / "report.html"


def read_metrics_log(workdir: epath.Path) -> list[dict]:
    """Returns the lines of a run's `metrics.jsonl`, `{"step", name: number, ...}`; an empty list if it does not exist.

    What is no such line is left out with a note, because the page is about the evaluation. A killed run may have left
    half a line at the end, which needs no note.
    """
    path, lines, damaged = workdir / "metrics.jsonl", [], []
    try:
        texts = path.read_bytes().split(b"\n") if path.exists() else []
    except Exception as e:  # a directory of this name, or a bucket's errors
        print0(f"note: {path}: cannot be read ({reason(e)}); the page has no training curves")
        texts = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        if (line := parse_log_line(text)) is None:
            damaged.append(number)
        else:
            lines.append(line)
    if damaged and damaged != [len(texts)]:
        print0(f"note: {path}: left out {len(damaged)} lines that are damaged, the first is line {damaged[0]}")
    return lines


def parse_log_line(text: bytes) -> dict | None:
    """Returns the step and the finite numbers of a line of `metrics.jsonl`; None if it is none."""
    try:
        line = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # not UTF-8, not JSON
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or not 0 <= line["step"] < 2**53:
        return None
    return {name: value for name, value in line.items() if is_number(value)}


def diagnose_result(e: EvaluationResult) -> Diagnosis:
    """Returns the diagnosis of an evaluated model. All processes compute it."""
    top = e.ranks["t2i_top"], e.ranks["i2t_top"]
    vectors = embed_items(Scorer(e.evaluator, e.params), e.images, e.texts)
    return diagnose(e.split, Answers(e.ranks["t2i"], *top, *vectors), e.evaluator.config)


def explain_examples(e: EvaluationResult) -> list[explanation.Explanation]:
    """Returns explanations of a few pairs; none if the matcher has no attention. All processes compute them."""
    if not explanation.can_explain(e.evaluator):
        return []
    captions = explanation.evenly_spaced(PAIRS_EXPLAINED, e.split.num_captions)
    return explanation.explain_captions(e.evaluator, e.params, e.split, e.images, e.texts, captions)


def draw_figures(e: EvaluationResult, pairs: list, lines: list[dict]) -> dict[str, bytes]:
    """Returns the figures of the page by name, as PNG files; `lines` are those of `metrics.jsonl`."""
    drawings = {"curves": charts.training_curves(lines)} if charts.find_panels(lines) else {}
    drawings["scores"] = charts.score_histograms(e.ranks["positive_scores"], *hardest_negative_scores(e.ranks))
    drawings["lengths"] = charts.recall_by_length(*recall_by_caption_length(e.split.all_captions(), e.ranks["t2i"]))
    drawings |= {f"explained_{k}": figures.draw_explanation(pair) for k, pair in enumerate(pairs, 1)}
    return {name: figures.to_png(figure) for name, figure in drawings.items()}


def hardest_negative_scores(ranks: dict) -> tuple[np.ndarray, np.ndarray]:
    """Returns the highest score of a negative, of each image `(I,)` and of each caption `(C,)`.

    It is NaN if all top results of a query that `ranks` keeps are positives.
    """
    caption_image = ranks["caption_image"]
    images = np.arange(len(ranks["i2t_top"]))
    is_positive = {
        "i2t": caption_image[ranks["i2t_top"]] == images[:, None],
        "t2i": ranks["t2i_top"] == caption_image[:, None],
    }
    result = []
    for side in ("i2t", "t2i"):
        is_negative = ~is_positive[side] & (ranks[f"{side}_top"] >= 0)
        scores = np.where(is_negative, ranks[f"{side}_top_scores"], -np.inf).max(1)
        result.append(np.where(np.isfinite(scores), scores, np.nan))
    return tuple(result)


def recall_by_caption_length(
    captions: list[str], ranks: np.ndarray
) -> tuple[list[str], list[int], dict[str, list[float]]]:
    """Groups captions by their number of words, and returns the groups' names, sizes, and recalls in percent.

    `ranks (C,)` are those of the captions' images; recalls are `{"R@1", "R@5", "R@10"}`, a value for each group.
    """
    group, names = group_by_length(captions)
    group_ranks = [ranks[group == k] for k in range(len(names))]
    recalls = {f"R@{k}": [100 * float(np.mean(r <= k)) for r in group_ranks] for k in metrics.RECALLS}
    return names, [len(r) for r in group_ranks], recalls


def best_and_worst(ranks: np.ndarray, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions of the best and of the worst queries.

    The best have rank 1 and the largest margins, of the positive score over that of the hardest negative. The worst
    have the largest ranks and, among equal ranks, the smallest margins.
    """
    margins = np.nan_to_num(margins, nan=0.0)
    best = np.lexsort((-margins, ranks > 1))[:QUERIES_SHOWN]
    worst = np.lexsort((margins, -ranks))[:QUERIES_SHOWN]
    return best[ranks[best] == 1], worst[ranks[worst] > 1]


def caption_queries(e: EvaluationResult) -> dict[str, list[dict]]:
    """Returns the best and the worst captions, `{"best", "worst"}`, each with its top images, for the page.

    The caption's own image is appended if it is not among them.
    """
    r, caption_image = e.ranks, e.ranks["caption_image"]
    best, worst = best_and_worst(r["t2i"], r["positive_scores"] - hardest_negative_scores(r)[1])

    def describe_query(caption):
        own_image = caption_image[caption]
        top = [(int(k), float(s)) for k, s in zip(r["t2i_top"][caption], r["t2i_top_scores"][caption], strict=True)]
        results = [image_entry(e.split, k, s, k == own_image) for k, s in top[:RESULTS_SHOWN] if k >= 0]
        own_entry = image_entry(e.split, int(own_image), float(r["positive_scores"][caption]), True)
        if not any(entry["positive"] for entry in results):
            results.append(own_entry)
        return {"text": caption_text(e.split, caption), "rank": int(r["t2i"][caption]), "results": results}

    return {"best": [describe_query(k) for k in best], "worst": [describe_query(k) for k in worst]}


def image_queries(e: EvaluationResult) -> dict[str, list[dict]]:
    """Returns the best and the worst images, `{"best", "worst"}`, each with its top captions, for the page.

    The image's best own caption is appended if none of its captions is among them. A result is `(rank, text, score,
    positive)`.
    """
    r, caption_image = e.ranks, e.ranks["caption_image"]
    best_positive = np.full(e.split.num_images, -np.inf)
    np.maximum.at(best_positive, caption_image, r["positive_scores"])
    best, worst = best_and_worst(r["i2t"], best_positive - hardest_negative_scores(r)[0])

    def describe_query(image):
        top = [(int(k), float(s)) for k, s in zip(r["i2t_top"][image], r["i2t_top_scores"][image], strict=True)]
        rank = int(r["i2t"][image])
        results = [
            (n, caption_text(e.split, k), s, caption_image[k] == image)
            for n, (k, s) in enumerate(top[:RESULTS_SHOWN], 1)
            if k >= 0
        ]
        own_scores = r["positive_scores"][caption_image == image]
        own_caption = int(e.split.caption_offsets[image] + np.argmax(own_scores))
        if not any(positive for *_, positive in results):
            results.append((rank, caption_text(e.split, own_caption), float(best_positive[image]), True))
        return {"image": image_entry(e.split, int(image), None, True), "rank": rank, "results": results}

    return {"best": [describe_query(k) for k in best], "worst": [describe_query(k) for k in worst]}


def caption_text(split: Split, caption: int) -> str:
    """Returns a caption by its position in the split."""
    image = int(split.caption_image[caption])
    return split.record(image)["captions"][int(caption - split.caption_offsets[image])]


def image_entry(split: Split, image: int, score: float | None, positive: bool) -> dict:
    """Returns an image for the page: its name, a small JPEG as a data URI, its score, and whether it is a positive.

    For precomputed regions, the URI is None and the name includes a caption.
    """
    record, uri = split.record(image), None
    name = record["image_id"]
    if "regions" not in record:
        with Image.open(io.BytesIO(record["image"])) as photo:
            thumbnail, out = (
                ImageOps.contain(to_rgb(ImageOps.exif_transpose(photo)), (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS)),
                io.BytesIO(),
            )
            thumbnail.save(out, "JPEG", quality=80)
        uri = pages.data_uri("jpeg", out.getvalue())
    else:
        name = f"{name}: {record['captions'][0]}"
    return {"name": name, "uri": uri, "score": score, "positive": positive}


def render(e: EvaluationResult, figure_files: dict[str, bytes], workdir: str, diagnosis: Diagnosis, pairs: list) -> str:
    """Returns the page; `pairs` are those of `explain_examples`. jinja2 escapes every value."""
    rows = {e.report["evaluated"]: e.report} | e.report.get("baselines", {})
    uris = {name: pages.data_uri("webp", to_webp(data)) for name, data in figure_files.items()}
    return pages.template("report.html").render(
        workdir=workdir,
        report=e.report,
        protocol=e.report["protocol"],
        rows=rows,
        captions=caption_queries(e),
        images=image_queries(e),
        figures=uris,
        explanations=[explanation.describe_pair(x, uris[f"explained_{k}"]) for k, x in enumerate(pairs, 1)],
        sentences=diagnosis.sentences,
        groups=make_table(make_entries(diagnosis.measures, e.split.num_images)),
        config=configuration.flatten(e.report["config"]),
    )


def to_webp(png: bytes) -> bytes:
    """Converts a PNG file to WebP, which is much smaller for figures with photographs."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, "WEBP", quality=90)
    return out.getvalue()


def define_flags() -> None:
    """Defines the flags of the command: those of an evaluation."""
    evaluate.define_flags()


def main() -> None:
    """Runs the command."""
    f = flags.FLAGS
    initialize()
    write_report(run_from_flags(), gallery_from_flags(), f.out, f.save_scores, f.rerank)
