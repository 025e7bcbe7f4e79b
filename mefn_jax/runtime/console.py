"""Printing on the console: from process 0 only, in aligned rows, and safe for any terminal."""

import contextlib
import unicodedata

import jax

from mefn_jax.errors import reason


def print0(text: str) -> None:
    """Prints on process 0 only."""
    if jax.process_index() == 0:
        print(text, flush=True)


@contextlib.contextmanager
def tolerate_faults(part: str):
    """Prints one line if the body fails, so that training goes on; `part` names the optional part of training that the
    body is, such as "pictures"."""
    try:
        yield
    except Exception as e:
        print0(f"warning: {part} failed ({reason(e)}); training goes on")


def printable(text: str) -> str:
    """Returns a text on one line, as a terminal or a picture can show it: a tab becomes a space; undecodable bytes,
    line breaks and other control characters become a replacement mark."""
    text, unprintable = text.replace("\t", " "), ("Cc", "Cs", "Zl", "Zp")
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(character) in unprintable else character
        for character in text
    )


def print_rows(rows: dict[str, str]) -> None:
    """Prints one line "name value" for each row, aligned."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print0(f"{name:<{width}}  {value}")


def format_duration(seconds: float) -> str:
    """Formats seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
