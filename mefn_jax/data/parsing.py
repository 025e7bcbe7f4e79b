"""Functions for the readers of all sources: text, JSON with checked keys, and images that lie inside their folder."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mefn_jax.errors import DataError


def read_text(path: Path) -> str:
    """Returns the text of a file. Raises DataError if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 at byte {e.start}; convert the file to UTF-8") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or e}") from None


def read_json(path: Path):
    """Returns the JSON value of a file. Raises DataError if it is missing, or malformed (naming the line)."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str):
    """Returns the value of a JSON text. Raises DataError that begins with `where` if it is malformed or an object has a
    key twice."""
    try:
        return json.loads(text, object_pairs_hook=_make_object)
    except ValueError as e:  # a JSONDecodeError names line and column; numbers with too many digits raise others
        raise DataError(f"{where}: not JSON ({e})") from None
    except RecursionError:
        raise DataError(f"{where}: not JSON that can be read (nested too deeply)") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """Yields the place of each line of JSON that is not empty, `file:line`, and its value. Raises DataError that names
    the line if it is malformed."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", parse_json(line, f"{path}:{number}")


def _make_object(pairs: list[tuple]) -> dict:
    """Returns the object of these keys and values. Raises ValueError if a key occurs twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError(f"the key {find_repeated(key for key, _ in pairs)!r} occurs twice in one object; keep one")
    return entries


def find_repeated(names: Iterable[str]) -> str | None:
    """Returns the first name that occurs for the second time; None if all differ."""
    seen = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def require(entry, key: str, kind: type, where: str):
    """Returns `entry[key]`. Raises DataError that names the entry (`where`), the key and its value if `entry` is no
    object, the key is missing, or the value is not of type `kind`."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object with the key {key!r}, found {type(entry).__name__}")
    if key not in entry:
        present = ", ".join(map(str, entry))[:300].encode("utf-8", "backslashreplace").decode()
        raise DataError(f"{where}: the key {key!r} is missing; present are {present or 'none'}")
    value = entry[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DataError(f"{where}: {key!r} must be of type {kind.__name__}, found {str(value)[:60]!r}")
    return value


def clean_caption(text: str, where: str) -> str:
    """Returns a caption with all white space folded to single spaces. Raises DataError if nothing is left, or it is no
    text: JSON can write halves of characters, which no file can hold."""
    text = " ".join(text.split())
    if not text:
        raise DataError(f"{where}: empty caption; write one or remove it")
    if re.search("[\ud800-\udfff]", text):
        raise DataError(f"{where}: caption {text[:60]!r} holds half of a character (a surrogate); correct it")
    return text


class ImageFiles:
    """Image files of a source. Each file belongs to one entry of the source: a photograph in two splits
    would let training see what is tested, and one under two names would be a false negative of itself."""

    def __init__(self):
        self._places = {}  # by file: name and place of its entry

    def find(self, folder: Path, name: str, where: str) -> Path:
        """Returns the path of the image `name` below `folder`, links followed. Raises DataError if it lies outside the
        folder, does not exist, or was found before, under whatever name."""
        path = find_image(folder, name, where)
        if path in self._places:
            other, place = self._places[path]
            spelling = "" if other == name else f" as {other!r}"
            raise DataError(f"{where}: image {name!r} is in the data already{spelling} ({place}); keep one entry of it")
        self._places[path] = name, where
        return path


def find_image(folder: Path, name: str, where: str) -> Path:
    """Returns the path of the image `name` below `folder`. Raises DataError if it lies outside the folder (also through
    a link) or does not exist."""
    try:
        path = (folder / name).resolve()
        is_inside, exists = path.is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as e:  # names that are too long or hold zero bytes, links in a circle
        raise DataError(f"{where}: image {name[:80]!r} is no usable file name ({e})") from None
    if not is_inside:
        raise DataError(f"{where}: image {name!r} leaves the image folder {folder}; give names inside it")
    if not exists:
        raise DataError(f"{where}: image {name!r} is not in {folder}; restore it or remove the entry")
    return path
