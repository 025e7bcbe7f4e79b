"""Retrieval with a trained model from the command line (DESIGN.md 8): images by a caption, captions by an image."""

import time
import unicodedata
from pathlib import Path

import numpy as np

from mefn_jax import pictures
from mefn_jax.checkpoint import digest
from mefn_jax.config import check_local
from mefn_jax.data import images
from mefn_jax.data.files import read_text
from mefn_jax.data.pipeline import pad_rows
from mefn_jax.data.tokenizer import UNK
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluator import Evaluator, load
from mefn_jax.index import build, check_finite, open_index, search
from mefn_jax.logs import printable, say
from mefn_jax.matching.tiled import CAPTIONS, parts
from mefn_jax.remote import directory
from mefn_jax.two_stage import shortlisted

SHORTLIST = 1000  # images that the matcher scores, the nearest by their coarse vectors


def index_images(workdir: str, step: str, folder: str, index: str, ema: bool = False) -> None:
    """Makes an index of a folder of images (see `index.build`)."""
    check_local("--index_images", folder)
    check_local("--index", index)
    evaluator, params, made_by = opened(workdir, step, ema)
    if evaluator.config.image.arch == "regions":
        raise ConfigError("--index_images: this model takes precomputed regions, not images")
    build(evaluator, params, made_by, folder, index)


def query(
    workdir: str, step: str, index: str, text: str, topk: int, shortlist: str = "", out: str = "", ema: bool = False
) -> list[tuple[float, str]]:
    """Prints the `topk` images of an index that fit a caption best, with their scores, and draws them into `out`.

    The matcher scores those of the `shortlist` (a number, at least `topk`, or a share; SHORTLIST if empty), the nearest
    by their coarse vectors. Returns scores and file names. Raises ConfigError for another checkpoint's index and for a
    caption without words.
    """
    start, picture = time.perf_counter(), out and pictures.checked(out)
    check_local("--index", index)
    evaluator, params, made_by = opened(workdir, step, ema)
    found = open_index(index, made_by)
    number = shortlisted(shortlist, len(found.names)) if shortlist else SHORTLIST
    loaded = time.perf_counter()
    texts = captions_of(evaluator, params, [text], "--query")
    vector = evaluator.coarse(params, texts)[0]
    positions, scores = search(found.coarse, vector, max(topk, number), evaluator.mesh, found.readable)
    if not evaluator.model.coarse_is_score:
        rows, columns = slice(0, len(positions)), slice(0, 1)
        scores = evaluator.scores(params, found.features(positions), texts)(rows, columns)[:, 0]
        check_finite(scores, [found.names[p] for p in positions])
        order = np.lexsort((positions, -scores))
        positions, scores = positions[order], scores[order]
    best = [(float(s), found.names[p]) for p, s in zip(positions[:topk], scores[:topk], strict=True)]
    stages = "" if evaluator.model.coarse_is_score else f", {len(positions)} of them scored by the matcher"
    table(best, f"{text!r} in {int(found.readable.sum())} images{stages}")
    say(f"loaded in {loaded - start:.1f} s, found in {time.perf_counter() - loaded:.1f} s")
    if picture:
        sheet = pictures.ranked(text, [(score, found.folder / name) for score, name in best])
        pictures.save(sheet, picture)
        say(f"wrote {out}")
    return best


def query_image(workdir: str, step: str, file: str, captions: str, topk: int, ema: bool = False):
    """Prints the `topk` lines of a text file that fit an image best, with their scores; returns both."""
    check_local("--query_image", file)
    check_local("--captions", captions)
    lines = [line.strip() for line in read_text(Path(captions)).split("\n")]
    evaluator, params, _ = opened(workdir, step, ema)
    if evaluator.config.image.arch == "regions":
        raise ConfigError("--query_image: this model takes precomputed regions, not images")
    try:
        pixels = images.decode(Path(file).read_bytes(), images.resize_of(evaluator.config.image), file)[None]
    except OSError as e:
        raise DataError(f"--query_image={file}: {e.strerror}") from None
    except DataError:
        raise DataError(f"--query_image={file}: cannot be decoded; give another image") from None
    kept = [line for line in lines if has_words(evaluator, line)]
    if not kept:
        raise DataError(f"--captions={captions}: no line with a word in it")
    texts = captions_of(evaluator, params, kept, f"--captions={captions}")
    found = evaluator.of_images(params, pad_rows(pixels, evaluator.mesh.size), 1)
    score = evaluator.scores(params, found, texts)
    scores = np.concatenate([score(slice(0, 1), some)[0] for some in parts(len(kept), CAPTIONS)])
    check_finite(scores, kept)
    best = [(float(scores[k]), kept[k]) for k in np.argsort(-scores, kind="stable")[:topk]]
    table(best, f"{printable(file)} in {len(kept)} captions")
    return best


def opened(workdir: str, step: str, ema: bool):
    """A trained model, its parameters, and what identifies them."""
    workdir = directory("--workdir", workdir)
    evaluator, params, number = load(workdir, step, ema)
    made_by = {"workdir": str(workdir), "step": number, "parameters": digest(params)}
    return evaluator, params, made_by


def captions_of(evaluator: Evaluator, params, lines: list[str], option: str):
    """Features of captions. Says which are cut; raises ConfigError for one without words."""
    most = evaluator.config.text.max_words
    if evaluator.config.text.arch == "words":
        raise ConfigError(f"{option}: this model takes cached words, not captions")
    for line in lines:
        if any(unicodedata.category(c) == "Cs" for c in line):
            raise ConfigError(f"{option}={printable(line)}: is not UTF-8")
        if not has_words(evaluator, line):
            raise ConfigError(f"{option}={line!r}: a caption without words")
        if set(evaluator.tokenizer.pieces(line)) == {UNK}:
            say(f"warning: the model knows no word of it: {line[:60]!r}")
        count = evaluator.tokenizer.count(line)
        if count > most:
            say(f"warning: {count} wordpieces, of which the model takes the first {most}: {line[:60]!r}...")
    return evaluator.of_captions(params, lines)


def has_words(evaluator: Evaluator, line: str) -> bool:
    """Whether a caption says anything: more than spaces and punctuation, which some tokenizers keep as pieces."""
    return any(unicodedata.category(c)[0] not in "PZC" for c in line) and evaluator.tokenizer.count(line) > 0


def table(rows: list[tuple[float, str]], title: str) -> None:
    """Prints ranks, scores and names."""
    say(f"\n{title}\n{'rank':>4} {'score':>8}")
    for k, (score, name) in enumerate(rows, 1):
        say(f"{k:4} {score:8.4f}  {printable(name)}")
