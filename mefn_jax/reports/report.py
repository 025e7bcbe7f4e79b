"""One page about an evaluated run, `report.html`, that needs nothing beside itself (`eval.py --report`)."""

import io
import json
import re

import jax
import numpy as np
from etils import epath
from PIL import Image, ImageOps

from mefn_jax import config as configuration
from mefn_jax import metrics
from mefn_jax.data.images import to_rgb
from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.evaluate import EvaluationResult, evaluate, output_dir
from mefn_jax.reports import charts, explanation, figures, pages
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.storage import resolve_directory, write_atomic

QUERIES_SHOWN = 4  # queries of a kind, best and worst
RESULTS_SHOWN = 5  # results of each
PAIRS_EXPLAINED = 3  # pairs
THUMBNAIL_PIXELS = 150  # pixels of a photograph's longer side
LENGTH_GROUPS = 5  # groups of captions by length, of about the same size


def write_report(
    workdir, data_dir: str, split: str, step: str, folds=(1,), out="", ema=False, save_scores="", rerank=""
) -> epath.Path:
    """Evaluates a run (see `evaluate.evaluate`) and writes `report.html`, and its pictures into `report/`, beside
    `metrics.json`. Returns the page's path. Raises ConfigError where ranks within folds would stand beside what was
    found in the whole gallery."""
    if len(folds) > 1 and folds[0] != 1:
        raise ConfigError("--report is of the first of --folds: put 1 first, or give one number")
    evaluated = evaluate(workdir, data_dir, split, step, folds, out, ema, save_scores, rerank)
    folder, pairs = output_dir(workdir, split, out, ema), explain_examples(evaluated)
    if jax.process_index():
        return folder / "report.html"
    pictures = draw_figures(evaluated, pairs, read_metrics_log(resolve_directory("--workdir", workdir)))
    page = render(evaluated, pictures, str(workdir))
    try:
        for name, data in pictures.items():
            write_atomic(folder / "report" / f"{name}.png", data)
        write_atomic(folder / "report.html", page.encode())
    except OSError as e:
        raise ConfigError(f"{folder}: cannot be written ({e})") from None
    print0(f"wrote {folder}/report.html ({len(page) / 1e6:.1f} MB) and its pictures in {folder}/report/")
    return folder / "report.html"


def read_metrics_log(workdir: epath.Path) -> list[dict]:
    """The whole lines of a run's `metrics.jsonl`; none without one."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may have left half a line


def explain_examples(e: EvaluationResult) -> list[explanation.Explanation]:
    """A few pairs, where the matcher can say why; all processes compute them."""
    if not explanation.can_explain(e.evaluator):
        return []
    captions = explanation.evenly_spaced(PAIRS_EXPLAINED, e.split.num_captions)
    return explanation.explain_captions(e.evaluator, e.params, e.split, e.images, e.texts, captions)


def draw_figures(e: EvaluationResult, pairs: list, lines: list[dict]) -> dict[str, bytes]:
    """The pictures by name, PNG files."""
    found = {"curves": charts.training_curves(lines)} if lines else {}
    found["scores"] = charts.score_histograms(e.ranks["positive_scores"], *hardest_negative_scores(e.ranks))
    found["lengths"] = charts.recall_by_length(*recall_by_caption_length(e.split.all_captions(), e.ranks["t2i"]))
    found |= {f"explained_{k}": figures.draw_explanation(pair) for k, pair in enumerate(pairs, 1)}
    return {name: figures.to_png(figure) for name, figure in found.items()}


def hardest_negative_scores(ranks: dict) -> tuple[np.ndarray, np.ndarray]:
    """The highest score of what is not relevant, of each image `(I,)` and each caption `(C,)`; NaN where all of the
    best that were kept are relevant."""
    owner = ranks["caption_image"]
    images = np.arange(len(ranks["i2t_top"]))
    right = {"i2t": owner[ranks["i2t_top"]] == images[:, None], "t2i": ranks["t2i_top"] == owner[:, None]}
    result = []
    for side in ("i2t", "t2i"):
        wrong = ~right[side] & (ranks[f"{side}_top"] >= 0)
        scores = np.where(wrong, ranks[f"{side}_top_scores"], -np.inf).max(1)
        result.append(np.where(np.isfinite(scores), scores, np.nan))
    return tuple(result)


def recall_by_caption_length(
    captions: list[str], ranks: np.ndarray
) -> tuple[list[str], list[int], dict[str, list[float]]]:
    """Groups of captions by their number of words: names, sizes, and R@1, R@5, R@10 in percent."""
    lengths = np.array([len(re.findall(r"\w+", caption)) for caption in captions])
    ends = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_GROUPS + 1)[1:], method="higher"))
    group = np.searchsorted(ends, lengths)
    of = [ranks[group == k] for k in range(len(ends))]
    spans = [(lengths[group == k].min(), lengths[group == k].max()) for k in range(len(ends))]
    names = [str(low) if low == high else f"{low} to {high}" for low, high in spans]
    return names, [len(r) for r in of], {f"R@{k}": [100 * float(np.mean(r <= k)) for r in of] for k in metrics.RECALLS}


def best_and_worst(ranks: np.ndarray, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best and the worst queries: those of rank 1 with the largest margin of their own score over the hardest
    negative, and those of the largest rank, of several the smallest margin."""
    margins = np.nan_to_num(margins, nan=0.0)
    best = np.lexsort((-margins, ranks > 1))[:QUERIES_SHOWN]
    worst = np.lexsort((margins, -ranks))[:QUERIES_SHOWN]
    return best[ranks[best] == 1], worst[ranks[worst] > 1]


def caption_queries(e: EvaluationResult) -> dict[str, list[dict]]:
    """The best and worst captions, each with the images found and its own, as the page shows them."""
    r, owner = e.ranks, e.ranks["caption_image"]
    best, worst = best_and_worst(r["t2i"], r["positive_scores"] - hardest_negative_scores(r)[1])

    def query(caption):
        image = owner[caption]
        top = [(int(k), float(s)) for k, s in zip(r["t2i_top"][caption], r["t2i_top_scores"][caption], strict=True)]
        found = [image_entry(e.split, k, s, k == image) for k, s in top[:RESULTS_SHOWN] if k >= 0]
        own = image_entry(e.split, int(image), float(r["positive_scores"][caption]), True)
        missed = not any(f["right"] for f in found)
        return {"text": caption_text(e.split, caption), "rank": int(r["t2i"][caption]), "found": found + [own] * missed}

    return {"best": [query(k) for k in best], "worst": [query(k) for k in worst]}


def image_queries(e: EvaluationResult) -> dict[str, list[dict]]:
    """The best and worst images, each with the captions found, as the page shows them."""
    r, owner = e.ranks, e.ranks["caption_image"]
    own = np.full(e.split.num_images, -np.inf)
    np.maximum.at(own, owner, r["positive_scores"])
    best, worst = best_and_worst(r["i2t"], own - hardest_negative_scores(r)[0])

    def query(image):
        top = [(int(k), float(s)) for k, s in zip(r["i2t_top"][image], r["i2t_top_scores"][image], strict=True)]
        rank = int(r["i2t"][image])
        lines = [
            (n, caption_text(e.split, k), s, owner[k] == image)
            for n, (k, s) in enumerate(top[:RESULTS_SHOWN], 1)
            if k >= 0
        ]
        mine = int(e.split.caption_offsets[image] + np.argmax(r["positive_scores"][owner == image]))
        if not any(right for *_, right in lines):
            lines.append((rank, caption_text(e.split, mine), float(own[image]), True))
        return {"image": image_entry(e.split, int(image), None, True), "rank": rank, "lines": lines}

    return {"best": [query(k) for k in best], "worst": [query(k) for k in worst]}


def caption_text(split: Split, caption: int) -> str:
    """A caption by its position in the split."""
    image = int(split.caption_image[caption])
    return split.record(image)["captions"][int(caption - split.caption_offsets[image])]


def image_entry(split: Split, image: int, score: float | None, right: bool) -> dict:
    """An image of the page: its name, a small JPEG as a data URI (of precomputed regions None, and a caption beside the
    name), score, and whether it is the right one."""
    record, uri = split.record(image), None
    name = record["image_id"]
    if "regions" not in record:
        with Image.open(io.BytesIO(record["image"])) as photo:
            small, out = (
                ImageOps.contain(to_rgb(ImageOps.exif_transpose(photo)), (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS)),
                io.BytesIO(),
            )
            small.save(out, "JPEG", quality=80)
        uri = pages.data_uri("jpeg", out.getvalue())
    else:
        name = f"{name}: {record['captions'][0]}"
    return {"name": name, "uri": uri, "score": score, "right": right}


def render(e: EvaluationResult, pictures: dict[str, bytes], workdir: str) -> str:
    """The page. What it is given is escaped by jinja2."""
    rows = {e.report["config"]["model"]: e.report} | e.report.get("baselines", {})
    uris = {name: pages.data_uri("webp", to_webp(data)) for name, data in pictures.items()}
    return pages.template("report.html").render(
        workdir=workdir,
        report=e.report,
        protocol=e.report["protocol"],
        rows=rows,
        captions=caption_queries(e),
        images=image_queries(e),
        pictures=uris,
        explained=[uri for name, uri in uris.items() if name.startswith("explained")],
        config=configuration.flatten(e.report["config"]),
    )


def to_webp(png: bytes) -> bytes:
    """A picture as WebP, which takes a fraction where there are photographs in it."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, "WEBP", quality=90)
    return out.getvalue()
