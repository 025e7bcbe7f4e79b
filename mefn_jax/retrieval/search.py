"""Retrieval with a trained model from the command line (DESIGN.md 8): images by a caption, captions by an image."""

import time
from pathlib import Path

import numpy as np

from mefn_jax.config import require_local
from mefn_jax.data import images
from mefn_jax.data.parsing import read_text
from mefn_jax.data.pipeline import pad_rows
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.captions import encode_captions, has_words
from mefn_jax.evaluation.evaluator import load_checkpoint
from mefn_jax.evaluation.rerank import parse_rerank
from mefn_jax.reports import contact_sheet
from mefn_jax.retrieval.index import build_index, open_index, require_finite, search_embeddings
from mefn_jax.runtime.checkpoint import params_digest
from mefn_jax.runtime.console import print0, printable
from mefn_jax.runtime.storage import resolve_directory
from mefn_jax.scoring.tiles import TILE_CAPTIONS, even_slices

DEFAULT_CANDIDATES = 1000  # images that the matcher scores, the nearest by their coarse vectors


def index_images(workdir: str, step: str, folder: str, index: str, ema: bool = False) -> None:
    """Makes an index of a folder of images (see `index.build`)."""
    require_local("--index_images", folder)
    require_local("--index", index)
    evaluator, params, made_by = load_model(workdir, step, ema)
    if evaluator.config.image.arch == "regions":
        raise ConfigError("--index_images: this model takes precomputed regions, not images")
    build_index(evaluator, params, made_by, folder, index)


def search_images(
    workdir: str, step: str, index: str, text: str, topk: int, rerank: str = "", out: str = "", ema: bool = False
) -> list[tuple[float, str]]:
    """Prints the `topk` images of an index that fit a caption best, with their scores, and draws them into `out`.

    The matcher scores those of the `rerank` (a number, at least `topk`, or a share; SHORTLIST if empty), the nearest
    by their coarse vectors. Returns scores and file names. Raises ConfigError for another checkpoint's index and for a
    caption without words.
    """
    start, picture = time.perf_counter(), out and contact_sheet.check_picture_path(out)
    require_local("--index", index)
    evaluator, params, made_by = load_model(workdir, step, ema)
    found = open_index(index, made_by)
    number = parse_rerank(rerank, len(found.names)) if rerank else DEFAULT_CANDIDATES
    loaded = time.perf_counter()
    texts = encode_captions(evaluator, params, [text], "--query")
    vector = evaluator.embed(params, texts)[0]
    positions, scores = search_embeddings(found.embeddings, vector, max(topk, number), evaluator.mesh, found.readable)
    if not evaluator.model.is_dual_encoder:
        rows, columns = slice(0, len(positions)), slice(0, 1)
        scores = evaluator.scores(params, found.features(positions), texts)(rows, columns)[:, 0]
        require_finite(scores, [found.names[p] for p in positions])
        order = np.lexsort((positions, -scores))
        positions, scores = positions[order], scores[order]
    best = [(float(s), found.names[p]) for p, s in zip(positions[:topk], scores[:topk], strict=True)]
    stages = "" if evaluator.model.is_dual_encoder else f", {len(positions)} of them scored by the matcher"
    print_results(best, f"{text!r} in {int(found.readable.sum())} images{stages}")
    print0(f"loaded in {loaded - start:.1f} s, found in {time.perf_counter() - loaded:.1f} s")
    if picture:
        sheet = contact_sheet.draw_ranking(text, [(score, found.folder / name) for score, name in best])
        contact_sheet.save_picture(sheet, picture)
        print0(f"wrote {out}")
    return best


def rank_captions(workdir: str, step: str, file: str, captions: str, topk: int, ema: bool = False):
    """Prints the `topk` lines of a text file that fit an image best, with their scores; returns both."""
    require_local("--query_image", file)
    require_local("--captions", captions)
    lines = [line.strip() for line in read_text(Path(captions)).split("\n")]
    evaluator, params, _ = load_model(workdir, step, ema)
    if evaluator.config.image.arch == "regions":
        raise ConfigError("--query_image: this model takes precomputed regions, not images")
    try:
        pixels = images.decode(Path(file).read_bytes(), images.resize_from_config(evaluator.config.image), file)[None]
    except OSError as e:
        raise DataError(f"--query_image={file}: {e.strerror}") from None
    except DataError:
        raise DataError(f"--query_image={file}: cannot be decoded; give another image") from None
    kept = [line for line in lines if has_words(evaluator, line)]
    if not kept:
        raise DataError(f"--captions={captions}: no line with a word in it")
    texts = encode_captions(evaluator, params, kept, f"--captions={captions}")
    found = evaluator.encode_pixels(params, pad_rows(pixels, evaluator.mesh.size), 1)
    score = evaluator.scores(params, found, texts)
    scores = np.concatenate([score(slice(0, 1), some)[0] for some in even_slices(len(kept), TILE_CAPTIONS)])
    require_finite(scores, kept)
    best = [(float(scores[k]), kept[k]) for k in np.argsort(-scores, kind="stable")[:topk]]
    print_results(best, f"{printable(file)} in {len(kept)} captions")
    return best


def load_model(workdir: str, step: str, ema: bool):
    """A trained model, its parameters, and what identifies them."""
    workdir = resolve_directory("--workdir", workdir)
    evaluator, params, number = load_checkpoint(workdir, step, ema)
    made_by = {"workdir": str(workdir), "step": number, "parameters": params_digest(params)}
    return evaluator, params, made_by


def print_results(rows: list[tuple[float, str]], title: str) -> None:
    """Prints ranks, scores and names."""
    print0(f"\n{title}\n{'rank':>4} {'score':>8}")
    for k, (score, name) in enumerate(rows, 1):
        print0(f"{k:4} {score:8.4f}  {printable(name)}")
