"""Searches with a trained model: images by a caption, captions by an image.

    python eval.py search --workdir=DIR --index=INDEX --caption=TEXT [--top_k=10] [--rerank=1000] [--out=found.png]
    python eval.py search --workdir=DIR --index=INDEX --queries=FILE [--out=FILE.jsonl]
    python eval.py search --workdir=DIR --image=FILE --captions=FILE.txt [--top_k=10]

Images are searched in an index (`eval.py index`): the nearest by embedding are candidates, and the matcher scores these
(docs/evaluation.md). A matcher with a bound scores as many as make sure that no better image is missed.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags

from mefn_jax.config import require_local
from mefn_jax.data import images
from mefn_jax.data.parsing import read_text
from mefn_jax.data.pipeline import pad_rows
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.captions import check_captions, encode_captions, has_words, read_image_file
from mefn_jax.evaluation.run import TrainedRun, define_run_flags, run_from_flags
from mefn_jax.reports import contact_sheet
from mefn_jax.retrieval.coarse import MAX_QUERIES
from mefn_jax.retrieval.index import check_index_exists, load_model, open_index
from mefn_jax.retrieval.queries import format_results, is_results_file, read_queries
from mefn_jax.retrieval.searcher import Results, Searcher, rank_captions
from mefn_jax.runtime.cli import define_count_flag, define_path_flag, define_process_flags, require_flag
from mefn_jax.runtime.console import print0, printable
from mefn_jax.runtime.multihost import initialize
from mefn_jax.runtime.outputs import check_output_file
from mefn_jax.runtime.storage import write_atomic


def search_images(
    run: TrainedRun, index: str, caption: str, top_k: int = 10, rerank: str = "", out: str = ""
) -> list[tuple[float, str]]:
    """Prints the `top_k` images of an index that match a caption best, with scores, and draws them into the file `out`.

    `rerank` says how many images the matcher scores (see `Searcher`). Returns scores and file names, best first. Raises
    ConfigError for an index of another checkpoint and for a caption without words.
    """
    start, picture_path = time.perf_counter(), out and contact_sheet.check_picture_path(out)
    searcher = load_searcher(run, index, rerank)
    evaluator, opened = searcher.evaluator, searcher.index
    loaded = time.perf_counter()
    (results,) = searcher.search(encode_captions(evaluator, searcher.params, [caption], "--caption"), top_k)
    best = name_results(searcher, results)
    reranked = f", {results.num_scored} of them scored by the matcher" if results.num_scored else ""
    reranked += ", which cannot miss one" if searcher.is_certified else ""
    print_results(best, f"{caption!r} in {int(opened.readable.sum())} images{reranked}")
    print0(f"loaded in {loaded - start:.1f} s, searched in {time.perf_counter() - loaded:.1f} s")
    if picture_path:
        sheet = contact_sheet.draw_ranking(caption, [(score, opened.folder / name) for score, name in best])
        contact_sheet.save_picture(sheet, picture_path)
        print0(f"wrote {out}")
    return best


def search_queries(run: TrainedRun, index: str, queries: str, top_k: int = 10, rerank: str = "", out: str = "") -> None:
    """Writes the `top_k` images of an index for each caption of the file `queries` (`read_queries`) as JSON lines, into
    the file `out`, or without one to standard output, with all other messages on standard error.

    Raises as `search_images` does, naming file and line, and DataError for a malformed file.
    """
    require_local("--queries", queries)
    start, path = time.perf_counter(), out and check_output_file("--out", out, (".jsonl",), is_results_file)
    captions, stdout, lines = read_queries(Path(queries)), sys.stdout, []
    with contextlib.nullcontext() if out else contextlib.redirect_stdout(sys.stderr):
        searcher = load_searcher(run, index, rerank)
        check_captions(searcher.evaluator, captions, "--queries")
        loaded = time.perf_counter()
        for (_, caption), results in zip(captions, answer_queries(searcher, captions, top_k), strict=True):
            text = format_results(caption, name_results(searcher, results))
            if out:
                lines.append(text)
            elif jax.process_index() == 0:
                print(text, end="", file=stdout, flush=True)
        if out and jax.process_index() == 0:
            save_lines(path, lines)
        seconds = time.perf_counter() - loaded
        print0(f"{len(captions)} queries in {int(searcher.index.readable.sum())} images{f': wrote {out}' * bool(out)}")
        print0(f"loaded in {loaded - start:.1f} s, searched in {seconds:.1f} s")


def load_searcher(run: TrainedRun, index: str, rerank: str = "") -> Searcher:
    """Loads a trained model and opens an index that it has made. Raises ConfigError for an index of another checkpoint,
    and as `Searcher` does."""
    require_local("--index", index)
    check_index_exists(index)
    evaluator, params, checkpoint_id = load_model(run)
    return Searcher(evaluator, params, open_index(index, checkpoint_id), rerank)


def answer_queries(searcher: Searcher, captions: list[tuple[str, str]], top_k: int) -> Iterator[Results]:
    """Yields the Results of captions, given with their places, in order; encodes a batch of one size at a time."""
    size = min(MAX_QUERIES, len(captions))
    for first in range(0, len(captions), size):
        batch = [caption for _, caption in captions[first : first + size]]
        padded = batch + batch[-1:] * (size - len(batch))
        texts = searcher.evaluator.encode_captions(searcher.params, padded)
        results = searcher.search_batches(texts, top_k)
        yield from itertools.islice(results, len(batch))


def name_results(searcher: Searcher, results: Results) -> list[tuple[float, str]]:
    """Returns the scores of results and the file names of their images, best first."""
    pairs = zip(results.scores, results.positions, strict=True)
    return [(float(score), searcher.index.names[position]) for score, position in pairs]


def save_lines(path, lines: list[str]) -> None:
    """Writes lines of results into a file. Raises ConfigError if that fails."""
    try:
        write_atomic(path, "".join(lines).encode())
    except OSError as e:
        raise ConfigError(f"--out={path}: cannot be written ({e})") from e


def rank_lines(run: TrainedRun, image: str, captions: str, top_k: int = 10) -> list[tuple[float, str]]:
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
    found = rank_captions(evaluator, params, image_features, texts, lines, top_k)
    best = [(float(score), lines[k]) for k, score in zip(found.positions, found.scores, strict=True)]
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
    define_path_flag("queries", None, "A file of many captions, one on each line, or .jsonl with the key caption.")
    define_path_flag("image", None, "An image file, for which the lines of --captions are ranked.")
    define_path_flag("captions", None, "A text file with one caption on each line, to rank for --image.")
    define_count_flag("top_k", 10, "Number of results.")
    flags.DEFINE_string(
        "rerank", "", "Images of the index that the matcher scores, as a number or a share; default: the nearest 1000."
    )
    define_path_flag(
        "out",
        "",
        "For --caption, a .png or .jpg file into which the images found are drawn; for --queries, a .jsonl file of "
        "results, which go to standard output without it.",
    )
    define_process_flags()


def main() -> None:
    """Runs the command."""
    f = flags.FLAGS
    if f.queries is not None:
        index = require_flag("index")
        if surplus := [name for name in ("caption", "image", "captions") if f[name].value is not None]:
            raise ConfigError(f"--queries and --{surplus[0]}: give one of them")
        initialize()
        search_queries(run_from_flags(), index, f.queries, f.top_k, f.rerank, f.out)
        return
    by_image = f.image is not None or f.captions is not None
    by_caption = f.index is not None or f.caption is not None or not by_image
    caption_query = [require_flag(name) for name in ("index", "caption")] if by_caption else None
    image_query = [require_flag(name) for name in ("image", "captions")] if by_image else None
    initialize()
    if caption_query:
        search_images(run_from_flags(), *caption_query, f.top_k, f.rerank, f.out)
    if image_query:
        rank_lines(run_from_flags(), *image_query, f.top_k)
