"""Searches with a trained model: images by a caption, captions by an image.

    python eval.py search --workdir=DIR --index=INDEX --caption=TEXT [--top_k=10] [--rerank=1000] [--out=found.png]
    python eval.py search --workdir=DIR --image=FILE --captions=FILE.txt [--top_k=10]

Images are searched in an index (`eval.py index`): the nearest by embedding are candidates, and the matcher scores these
(docs/evaluation.md). A matcher with a bound scores as many as make sure that no better image is missed.
"""

import time
from pathlib import Path

import numpy as np
from absl import flags

from mefn_jax.config import require_local
from mefn_jax.data import images
from mefn_jax.data.parsing import read_text
from mefn_jax.data.pipeline import pad_rows
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.captions import encode_captions, has_words, read_image_file
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.evaluation.rerank import parse_rerank
from mefn_jax.evaluation.run import TrainedRun, define_run_flags, run_from_flags
from mefn_jax.features import Features
from mefn_jax.reports import contact_sheet
from mefn_jax.retrieval.index import (
    Index,
    check_index_exists,
    load_model,
    open_index,
    require_finite,
    search_embeddings,
)
from mefn_jax.runtime.cli import define_count_flag, define_path_flag, define_process_flags, require_flag
from mefn_jax.runtime.console import print0, printable
from mefn_jax.runtime.multihost import initialize
from mefn_jax.scoring import certificate
from mefn_jax.scoring.tiles import TILE_CAPTIONS, even_slices

FIRST_CANDIDATES = 128  # images that a matcher with a bound scores first
DEFAULT_CANDIDATES = 1000  # images that the matcher scores for a caption: the nearest by embedding


def search_images(
    run: TrainedRun, index: str, caption: str, top_k: int = 10, rerank: str = "", out: str = ""
) -> list[tuple[float, str]]:
    """Prints the `top_k` images of an index that match a caption best, with scores, and draws them into the file `out`.

    The matcher scores the images nearest by embedding: as many as `rerank` says (a share, or a number; by default
    DEFAULT_CANDIDATES), but at least `top_k`. By default, a matcher with a bound scores as many as make sure that the
    results are those of all images. Returns scores and file names, best first. Raises ConfigError for an
    index of another checkpoint and for a caption without words.
    """
    start, picture_path = time.perf_counter(), out and contact_sheet.check_picture_path(out)
    require_local("--index", index)
    check_index_exists(index)
    evaluator, params, checkpoint_id = load_model(run)
    opened = open_index(index, checkpoint_id)
    num_candidates = parse_rerank(rerank, len(opened.names)) if rerank else DEFAULT_CANDIDATES
    is_certified = evaluator.model.has_bound and not rerank
    loaded = time.perf_counter()
    texts = encode_captions(evaluator, params, [caption], "--caption")
    query = evaluator.text_vectors(params, texts)[0]
    if opened.embeddings.shape[1:] != query.shape:
        raise DataError(f"--index={index}: embeddings.npy is damaged; make the index again")
    if is_certified:
        positions, scores = search_certified(evaluator, params, opened, texts, query, top_k)
    else:
        k = max(top_k, num_candidates)
        positions, scores = search_embeddings(opened.embeddings, query, k, evaluator.mesh, opened.readable)
        if not evaluator.model.is_dual_encoder:
            positions, scores = sort_results(positions, score_images(evaluator, params, opened, positions, texts))
    best = [(float(s), opened.names[p]) for p, s in zip(positions[:top_k], scores[:top_k], strict=True)]
    reranked = "" if evaluator.model.is_dual_encoder else f", {len(positions)} of them scored by the matcher"
    reranked += ", which cannot miss one" if is_certified else ""
    print_results(best, f"{caption!r} in {int(opened.readable.sum())} images{reranked}")
    print0(f"loaded in {loaded - start:.1f} s, searched in {time.perf_counter() - loaded:.1f} s")
    if picture_path:
        sheet = contact_sheet.draw_ranking(caption, [(score, opened.folder / name) for score, name in best])
        contact_sheet.save_picture(sheet, picture_path)
        print0(f"wrote {out}")
    return best


def score_images(evaluator: Evaluator, params, opened: Index, positions: np.ndarray, texts: Features) -> np.ndarray:
    """Returns the matcher's scores of images of an index with one text, float32 `(n,)`. Raises TrainingError if one is
    not finite."""
    rows, columns = slice(0, len(positions)), slice(0, 1)
    scores = evaluator.scores(params, opened.features(positions), texts)(rows, columns)[:, 0]
    require_finite(scores, [opened.names[p] for p in positions])
    return scores


def sort_results(positions: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions and scores, best first, equal scores by position."""
    order = np.lexsort((positions, -scores))
    return positions[order], scores[order]


def search_certified(evaluator: Evaluator, params, opened: Index, texts: Features, query: np.ndarray, top_k: int):
    """Scores images of an index by falling products with the query until no other can be among the first `top_k`
    (docs/method.md, Eqs. 107 and 108). Returns positions and scores of those that were scored, best first."""
    radius = evaluator.model.score_bound()[1] + certificate.ROUNDING
    text_offset = evaluator.hub_offsets(params, texts, texts)[1][0]
    total, number = int(opened.readable.sum()), max(top_k, FIRST_CANDIDATES)
    positions, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    while True:
        # From half of the images on, all: the products are known, so nothing is saved by another round.
        number = total if number > certificate.MOST * total else number
        nearest, products = search_embeddings(opened.embeddings, query, number, evaluator.mesh, opened.readable)
        new = nearest[len(positions) :]
        scores = np.concatenate([scores, score_images(evaluator, params, opened, new, texts)])
        positions = nearest
        kth_score = np.sort(scores)[-min(top_k, total)]
        if number >= total or products[-1] - text_offset + radius < kth_score:
            return sort_results(positions, scores)
        number *= 2


def rank_captions(run: TrainedRun, image: str, captions: str, top_k: int = 10) -> list[tuple[float, str]]:
    """Prints the `top_k` lines of the text file `captions` that match the image file `image` best, with their scores.

    Lines without words are left out. Returns scores and lines, best first. Raises ConfigError for a model of regions,
    and DataError if a file cannot be read or no line has a word.
    """
    require_local("--image", image)
    require_local("--captions", captions)
    lines = [line.strip() for line in read_text(Path(captions)).split("\n")]
    data = read_image_file(image)
    evaluator, params, _ = load_model(run)
    if evaluator.config.image.arch == "regions":
        raise ConfigError("--image: this model takes precomputed regions, not images")
    try:
        pixels = images.decode(data, images.resize_from_config(evaluator.config.image), image)[None]
    except DataError:
        raise DataError(f"--image={image}: cannot be decoded; give another image") from None
    lines = [line for line in lines if has_words(evaluator, line)]
    if not lines:
        raise DataError(f"--captions={captions}: no line with a word in it")
    texts = encode_captions(evaluator, params, lines, f"--captions={captions}")
    image_features = evaluator.encode_pixels(params, pad_rows(pixels, evaluator.mesh.size), 1)
    tiled_scores = evaluator.scores(params, image_features, texts)
    columns = even_slices(len(lines), TILE_CAPTIONS)
    scores = np.concatenate([tiled_scores(slice(0, 1), part)[0] for part in columns])
    require_finite(scores, lines)
    best = [(float(scores[k]), lines[k]) for k in np.argsort(-scores, kind="stable")[:top_k]]
    print_results(best, f"{printable(image)} in {len(lines)} captions")
    return best


def print_results(rows: list[tuple[float, str]], title: str) -> None:
    """Prints ranks, scores and names under a title."""
    print0(f"\n{title}\n{'rank':>4} {'score':>8}")
    for k, (score, name) in enumerate(rows, 1):
        print0(f"{k:4} {score:8.4f}  {printable(name)}")


def define_flags() -> None:
    """Defines the flags of the command."""
    define_run_flags()
    define_path_flag("index", None, "Directory of an index, whose images are ranked for --caption.")
    flags.DEFINE_string("caption", None, "The caption that is searched for.")
    define_path_flag("image", None, "An image file, for which the lines of --captions are ranked.")
    define_path_flag("captions", None, "A text file with one caption on each line, to rank for --image.")
    define_count_flag("top_k", 10, "Number of results.")
    flags.DEFINE_string(
        "rerank", "", "Images of the index that the matcher scores, as a number or a share; default: the nearest 1000."
    )
    define_path_flag("out", "", "A .png or .jpg file into which the images found by --caption are drawn.")
    define_process_flags()


def main() -> None:
    """Runs the command."""
    f = flags.FLAGS
    by_image = f.image is not None or f.captions is not None
    by_caption = f.index is not None or f.caption is not None or not by_image
    caption_query = [require_flag(name) for name in ("index", "caption")] if by_caption else None
    image_query = [require_flag(name) for name in ("image", "captions")] if by_image else None
    initialize()
    if caption_query:
        search_images(run_from_flags(), *caption_query, f.top_k, f.rerank, f.out)
    if image_query:
        rank_captions(run_from_flags(), *image_query, f.top_k)
