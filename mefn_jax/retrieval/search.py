"""Searches with a trained model from the command line: images by a caption, captions by an image.

Images are searched in an index (`index.py`): the nearest by embedding are candidates, and the matcher scores these
(docs/evaluation.md).
"""

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

DEFAULT_CANDIDATES = 1000  # images that the matcher scores for a caption: the nearest by embedding


def index_images(workdir: str, step: str, folder: str, index: str, ema: bool = False) -> None:
    """Makes an index of a folder of images (see `index.build_index`). Raises ConfigError for a model of regions."""
    require_local("--index_images", folder)
    require_local("--index", index)
    evaluator, params, checkpoint_id = load_model(workdir, step, ema)
    if evaluator.config.image.arch == "regions":
        raise ConfigError("--index_images: this model takes precomputed regions, not images")
    build_index(evaluator, params, checkpoint_id, folder, index)


def search_images(
    workdir: str, step: str, index: str, text: str, topk: int, rerank: str = "", out: str = "", ema: bool = False
) -> list[tuple[float, str]]:
    """Prints the `topk` images of an index that match a caption best, with scores, and draws them into the file `out`.

    The matcher scores the images nearest by embedding: as many as `rerank` says (a share, or a number; by default
    DEFAULT_CANDIDATES), but at least `topk`. Returns scores and file names, best first. Raises ConfigError for an index
    of another checkpoint and for a caption without words.
    """
    start, picture_path = time.perf_counter(), out and contact_sheet.check_picture_path(out)
    require_local("--index", index)
    evaluator, params, checkpoint_id = load_model(workdir, step, ema)
    opened = open_index(index, checkpoint_id)
    num_candidates = parse_rerank(rerank, len(opened.names)) if rerank else DEFAULT_CANDIDATES
    loaded = time.perf_counter()
    texts = encode_captions(evaluator, params, [text], "--query")
    query = evaluator.text_vectors(params, texts)[0]
    k = max(topk, num_candidates)
    positions, scores = search_embeddings(opened.embeddings, query, k, evaluator.mesh, opened.readable)
    if not evaluator.model.is_dual_encoder:
        rows, columns = slice(0, len(positions)), slice(0, 1)
        scores = evaluator.scores(params, opened.features(positions), texts)(rows, columns)[:, 0]
        require_finite(scores, [opened.names[p] for p in positions])
        order = np.lexsort((positions, -scores))
        positions, scores = positions[order], scores[order]
    best = [(float(s), opened.names[p]) for p, s in zip(positions[:topk], scores[:topk], strict=True)]
    reranked = "" if evaluator.model.is_dual_encoder else f", {len(positions)} of them scored by the matcher"
    print_results(best, f"{text!r} in {int(opened.readable.sum())} images{reranked}")
    print0(f"loaded in {loaded - start:.1f} s, searched in {time.perf_counter() - loaded:.1f} s")
    if picture_path:
        sheet = contact_sheet.draw_ranking(text, [(score, opened.folder / name) for score, name in best])
        contact_sheet.save_picture(sheet, picture_path)
        print0(f"wrote {out}")
    return best


def rank_captions(workdir: str, step: str, file: str, captions: str, topk: int, ema: bool = False):
    """Prints the `topk` lines of the text file `captions` that match the image file `file` best, with their scores.

    Lines without words are left out. Returns scores and lines, best first. Raises ConfigError for a model of regions,
    and DataError if a file cannot be read or no line has a word.
    """
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
    lines = [line for line in lines if has_words(evaluator, line)]
    if not lines:
        raise DataError(f"--captions={captions}: no line with a word in it")
    texts = encode_captions(evaluator, params, lines, f"--captions={captions}")
    image = evaluator.encode_pixels(params, pad_rows(pixels, evaluator.mesh.size), 1)
    tiled_scores = evaluator.scores(params, image, texts)
    columns = even_slices(len(lines), TILE_CAPTIONS)
    scores = np.concatenate([tiled_scores(slice(0, 1), part)[0] for part in columns])
    require_finite(scores, lines)
    best = [(float(scores[k]), lines[k]) for k in np.argsort(-scores, kind="stable")[:topk]]
    print_results(best, f"{printable(file)} in {len(lines)} captions")
    return best


def load_model(workdir: str, step: str, ema: bool):
    """Loads a trained model: the Evaluator, its parameters, and a dict that identifies the checkpoint."""
    workdir = resolve_directory("--workdir", workdir)
    evaluator, params, step_number = load_checkpoint(workdir, step, ema)
    checkpoint_id = {"workdir": str(workdir), "step": step_number, "parameters": params_digest(params)}
    return evaluator, params, checkpoint_id


def print_results(rows: list[tuple[float, str]], title: str) -> None:
    """Prints ranks, scores and names under a title."""
    print0(f"\n{title}\n{'rank':>4} {'score':>8}")
    for k, (score, name) in enumerate(rows, 1):
        print0(f"{k:4} {score:8.4f}  {printable(name)}")
