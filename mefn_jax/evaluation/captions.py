"""TODO."""

import unicodedata

from mefn_jax.data.tokenizer import UNK
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.runtime.console import print0, printable


def encode_captions(evaluator: Evaluator, params, lines: list[str], option: str):
    """Features of captions. Says which are cut; raises ConfigError for one without words."""
    most = evaluator.config.text.max_tokens
    if evaluator.config.text.arch == "cached":
        raise ConfigError(f"{option}: this model takes cached words, not captions")
    for line in lines:
        if any(unicodedata.category(c) == "Cs" for c in line):
            raise ConfigError(f"{option}={printable(line)}: is not UTF-8")
        if not has_words(evaluator, line):
            raise ConfigError(f"{option}={line!r}: a caption without words")
        if set(evaluator.tokenizer.pieces(line)) == {UNK}:
            print0(f"warning: the model knows no word of it: {line[:60]!r}")
        count = evaluator.tokenizer.count(line)
        if count > most:
            print0(f"warning: {count} wordpieces, of which the model takes the first {most}: {line[:60]!r}...")
    return evaluator.encode_captions(params, lines)


def has_words(evaluator: Evaluator, line: str) -> bool:
    """Whether a caption says anything: more than spaces and punctuation, which some tokenizers keep as pieces."""
    return any(unicodedata.category(c)[0] not in "PZC" for c in line) and evaluator.tokenizer.count(line) > 0
