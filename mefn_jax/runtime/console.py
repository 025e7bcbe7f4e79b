"""TODO."""

import unicodedata

import jax


def print0(text: str) -> None:
    """Prints on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def printable(text: str) -> str:
    """A text on one line, as a terminal or a picture can show it: a space for a tab, a mark for each byte that is no
    UTF-8, each line break and other control."""
    text, odd = text.replace("\t", " "), ("Cc", "Cs", "Zl", "Zp")
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in odd else c for c in text)


def print_rows(rows: dict[str, str]) -> None:
    """One "name  value" line each, aligned."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print0(f"{name:<{width}}  {value}")


def format_duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
