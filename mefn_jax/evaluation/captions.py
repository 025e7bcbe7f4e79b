"""Queries that a user gives: captions that were typed or are kept in a file, and image files.

Says if the model cannot read a caption well.
"""

import unicodedata
from pathlib import Path

from mefn_jax.data.tokenizer import UNK
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.runtime.console import print0, printable


def read_image_file(path) -> bytes:
    """Returns the bytes of the file that `--image` names. Raises DataError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as e:  # ValueError: a zero byte
        raise DataError(f"--image={path}: {getattr(e, 'strerror', None) or e}") from None


def encode_captions(evaluator: Evaluator, params, captions: list[str], option: str):
    """Returns the Features of captions, after `check_captions` of them, which names `option` and the caption."""
    check_captions(evaluator, [(f"{option}={printable(caption)}", caption) for caption in captions], option)
    return evaluator.encode_captions(params, captions)


def check_captions(evaluator: Evaluator, captions: list[tuple[str, str]], option: str) -> None:
    """Checks captions before they are encoded, each given with its place for the message; warns of a caption that the
    model cannot read well.

    Raises ConfigError as `check_caption` does, and naming `option` for a model of cached text.
    """
    if evaluator.config.text.arch == "cached":
        raise ConfigError(f"{option}: this model takes cached text, not captions")
    for place, caption in captions:
        for note in check_caption(evaluator, caption, place):
            print0(f"warning: {caption[:60]!r}: {note}")


def check_caption(evaluator: Evaluator, caption: str, place: str) -> list[str]:
    """Returns sentences that say how badly the model reads a caption: it knows no word of it, or cuts it. Raises
    ConfigError, naming the `place`, for a caption without words or that is not UTF-8."""
    if any(unicodedata.category(c) == "Cs" for c in caption):
        raise ConfigError(f"{place}: not UTF-8")
    if not has_words(evaluator, caption):
        raise ConfigError(f"{place}: a caption without words")
    notes, tokenizer = [], evaluator.tokenizer
    if set(tokenizer.pieces(caption)) == {UNK}:
        notes.append("The model knows no word of this caption.")
    if (count := tokenizer.count(caption)) > tokenizer.max_tokens:
        notes.append(f"The caption has {count} wordpieces, but the model reads only the first {tokenizer.max_tokens}.")
    return notes


def has_words(evaluator: Evaluator, caption: str) -> bool:
    """Returns whether a caption has more than spaces and punctuation, which some tokenizers keep as wordpieces."""
    return any(unicodedata.category(c)[0] not in "PZC" for c in caption) and evaluator.tokenizer.count(caption) > 0
