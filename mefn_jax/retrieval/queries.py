"""Reads many queries from a file, and writes their results as JSON lines."""

import json
from pathlib import Path

from mefn_jax.data.parsing import clean_caption, read_json_lines, read_text, require
from mefn_jax.errors import DataError

RESULT_KEYS = ("query", "rank", "image", "score")  # of a line of results


def read_queries(path: Path) -> list[tuple[str, str]]:
    """Reads captions: those of the key `caption` of JSON lines (`.jsonl`), or one on each line of a text file; empty
    lines are left out.

    Returns the place, `file:line`, and the caption of each. Raises DataError, naming the line, if the file is
    malformed, and if it has no query.
    """
    if path.suffix.lower() == ".jsonl":
        entries = [(where, require(entry, "caption", str, where)) for where, entry in read_json_lines(path)]
    else:
        lines = enumerate(read_text(path).split("\n"), 1)
        entries = [(f"{path}:{number}", line) for number, line in lines if line.strip()]
    if not entries:
        raise DataError(f"{path}: no query in it; give a caption on each line")
    return [(where, clean_caption(caption, where)) for where, caption in entries]


def format_results(query: str, results: list[tuple[float, str]]) -> str:
    """Formats scores and file names, best first, as lines of JSON: an object with RESULT_KEYS for each."""
    values = ((query, rank, name, float(str(score))) for rank, (score, name) in enumerate(results, 1))
    return "".join(json.dumps(dict(zip(RESULT_KEYS, line, strict=True))) + "\n" for line in values)


def is_results_file(path: Path) -> bool:
    """Returns whether a file is one of `format_results`. May raise any error for other files."""
    with path.open(encoding="utf-8") as file:
        return tuple(json.loads(file.readline())) == RESULT_KEYS
