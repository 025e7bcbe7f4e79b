"""Retrieval with a trained model from the command line (DESIGN.md 8): images by a caption, captions by an image."""

import time
from pathlib import Path

import numpy as np
from PIL import Image

from mefn_jax import pictures
from mefn_jax.checkpoint import digest
from mefn_jax.data import images
from mefn_jax.data.files import read_text
from mefn_jax.data.pipeline import pad_rows
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluator import Evaluator, load
from mefn_jax.index import build, open_index, search
from mefn_jax.logs import say
from mefn_jax.remote import directory

SHORTLIST = 1000  # images that the matcher scores, the nearest by their coarse vectors


def index_images(workdir: str, step: str, folder: str, index: str, ema: bool = False) -> None:
    """Makes an index of a folder of images (see `index.build`)."""
    evaluator, params, made_by = opened(workdir, step, ema)
    if evaluator.config.image.arch == "regions":
        raise ConfigError("--index_images: this model takes precomputed regions, not images")
    build(evaluator, params, made_by, folder, index)


def query(
    workdir: str, step: str, index: str, text: str, topk: int, shortlist: int = 0, out: str = "", ema: bool = False
) -> list[tuple[float, str]]:
    """Prints the `topk` images of an index that fit a caption best, with their scores, and draws them into `out`.

    The matcher scores the `shortlist` (0: SHORTLIST) images that are nearest by their coarse vectors. Returns scores
    and file names. Raises ConfigError for another checkpoint's index and for a caption without words.
    """
    start, picture = time.perf_counter(), out and checked_out(out)
    evaluator, params, made_by = opened(workdir, step, ema)
    found = open_index(index, made_by)
    loaded = time.perf_counter()
    texts = captions_of(evaluator, params, [text], "--query")
    vector = evaluator.coarse(params, texts)[0]
    number = max(topk, shortlist or SHORTLIST)
    positions, scores = search(found.coarse, vector, number, evaluator.mesh, found.readable)
    if not evaluator.model.coarse_is_score:
        features = found.features(positions)
        scores = evaluator.scores(params, features, texts)(slice(0, len(positions)), slice(0, 1))[:, 0]
        order = np.lexsort((positions, -scores))
        positions, scores = positions[order], scores[order]
    best = [(float(s), found.names[p]) for p, s in zip(positions[:topk], scores[:topk], strict=True)]
    stages = "" if evaluator.model.coarse_is_score else f", {len(positions)} of them scored by the matcher"
    table(best, f"{text!r} in {int(found.readable.sum())} images{stages}")
    say(f"loaded in {loaded - start:.1f} s, found in {time.perf_counter() - loaded:.1f} s")
    if picture:
        pictures.ranked(text, [(score, found.folder / name) for score, name in best]).save(picture)
        say(f"wrote {out}")
    return best


def query_image(workdir: str, step: str, file: str, captions: str, topk: int, ema: bool = False):
    """Prints the `topk` lines of a text file that fit an image best, with their scores; returns both."""
    lines = [line.strip() for line in read_text(Path(captions)).splitlines()]
    evaluator, params, _ = opened(workdir, step, ema)
    if evaluator.config.image.arch == "regions":
        raise ConfigError("--query_image: this model takes precomputed regions, not images")
    try:
        pixels = images.decode(Path(file).read_bytes(), images.resize_of(evaluator.config.image), file)[None]
    except OSError as e:
        raise DataError(f"--query_image={file}: {e.strerror}") from None
    except DataError:
        raise DataError(f"--query_image={file}: cannot be decoded; give another image") from None
    kept = [line for line in lines if evaluator.tokenizer.count(line)]
    if not kept:
        raise DataError(f"--captions={captions}: no line with a word in it")
    texts = captions_of(evaluator, params, kept, f"--captions={captions}")
    found = evaluator.of_images(params, pad_rows(pixels, evaluator.mesh.size), 1)
    scores = evaluator.scores(params, found, texts)(slice(0, 1), slice(0, len(kept)))[0]
    best = [(float(scores[k]), kept[k]) for k in np.argsort(-scores, kind="stable")[:topk]]
    table(best, f"{file} in {len(kept)} captions")
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
    counts = [evaluator.tokenizer.count(line) for line in lines]
    if not all(counts):
        raise ConfigError(f"{option}={lines[counts.index(0)]!r}: a caption without words")
    for line, count in zip(lines, counts, strict=True):
        if count > most:
            say(f"warning: {count} wordpieces, of which the model takes the first {most}: {line[:60]!r}...")
    return evaluator.of_captions(params, lines)


def table(rows: list[tuple[float, str]], title: str) -> None:
    """Prints ranks, scores and names."""
    say(f"\n{title}\n{'rank':>4} {'score':>8}")
    for k, (score, name) in enumerate(rows, 1):
        say(f"{k:4} {score:8.4f}  {name}")


def checked_out(out: str) -> Path:
    """The path of a picture to write. Raises ConfigError if Pillow has no such format or the folder cannot be made."""
    path = Path(out)
    if path.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"--out={out}: give a .png or .jpg file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--out={out}: {e.strerror}") from None
    return path
