"""Readers of captions of the same photographs in several languages: XM3600, Multi30K, and a table with a column
`language`."""

import gzip
from pathlib import Path

import numpy as np

from mefn_jax.benchmarks.items import ImagePool, LanguageTable
from mefn_jax.benchmarks.request import Request
from mefn_jax.config import suggest
from mefn_jax.data.parsing import clean_caption, read_json_lines, read_text, require
from mefn_jax.data.sources.table import read_rows
from mefn_jax.errors import ConfigError, DataError, reason

XM3600_FILE = "captions.jsonl"
TABLE_FILES = ("captions.csv", "captions.jsonl")


def read_xm3600(request: Request) -> LanguageTable:
    """Reads Crossmodal-3600 (Thapliyal et al. 2022): `captions.jsonl`, a line a photograph with its key and, for each
    of 36 languages, an object with the list `caption`. Photographs are `images/<key>.jpg`.

    Raises DataError that names the malformed line.
    """
    path, folder = request.find_file(XM3600_FILE), request.image_folder("images")
    rows, seen = [], {}
    for where, entry in read_json_lines(path):
        key = require(entry, "image/key", str, where)
        if seen.setdefault(key, where) != where:
            raise DataError(f"{where}: image/key {key!r} is that of {seen[key]} already; remove one line")
        of_languages = {code: value for code, value in entry.items() if isinstance(value, dict)}
        if not of_languages:
            raise DataError(f"{where}: has captions in no language; restore the published file")
        for code, value in of_languages.items():
            for text in require(value, "caption", list, f"{where}: {code}"):
                rows.append((f"{key}.jpg", code, text, where))
    return make_table_of_languages(request, folder, rows)


def read_multi30k(request: Request) -> LanguageTable:
    """Reads a test set of Multi30K's task 1 (Elliott et al. 2016): `raw/<set>.<language>`, a line a photograph, perhaps
    compressed (.gz), and the names of the photographs in `image_splits/<set>.txt`. `--split` names the set, by default
    test_2016_flickr. Raises DataError if the files have other numbers of lines."""
    name = "test_2016_flickr" if request.split == "test" else request.split
    list_path = request.find_file(*_places(f"image_splits/{name}.txt"))
    # The list of COCO's photographs has `<name>#<caption>`.
    names = [line.partition("#")[0].strip() for line in read_text(list_path).splitlines()]
    files = {}
    for place in _places("raw"):
        for path in sorted((request.folder / place).glob(f"{name}.*")):
            files.setdefault(path.name.removeprefix(f"{name}.").removesuffix(".gz"), path)
    if not files:
        request.find_file(*_places(f"raw/{name}.en.gz"))
    rows = []
    for code, path in files.items():
        lines = _read_lines(path)
        if len(lines) != len(names):
            raise DataError(f"{path}: {len(lines)} lines, but {list_path} names {len(names)} photographs; restore both")
        places = (f"{path}:{number}" for number in range(1, len(lines) + 1))
        rows += zip(names, [code] * len(lines), lines, places, strict=True)
    return make_table_of_languages(request, request.image_folder("flickr30k-images", "images"), rows)


def _places(name: str) -> list[str]:
    """Returns where a file or folder of Multi30K's task 1 may be: in the repository, in `task1/`, or in that itself."""
    return [f"data/task1/{name}", f"task1/{name}", name]


def _read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file, which may be compressed. Raises DataError if it cannot be read."""
    if path.suffix != ".gz":
        return read_text(path).splitlines()
    try:
        return gzip.decompress(path.read_bytes()).decode().splitlines()
    except (OSError, EOFError, ValueError, gzip.zlib.error) as e:
        raise DataError(f"{path}: cannot be decompressed to UTF-8 ({reason(e)}); restore the published file") from None


def read_language_table(request: Request) -> LanguageTable:
    """Reads a table of a user's own, `captions.csv` or `captions.jsonl`, with the columns image, caption and language.
    Raises DataError that names the malformed line."""
    path = request.find_file(*TABLE_FILES)
    rows = [
        *(
            (require(row, "image", str, where), require(row, "language", str, where).strip(), row.get("caption"), where)
            for where, row in read_rows(path)
        )
    ]
    return make_table_of_languages(request, request.image_folder(), rows)


def make_table_of_languages(request: Request, folder: Path, rows: list[tuple]) -> LanguageTable:
    """Returns the table of rows `(image, language, caption, where)`, of the languages that are wanted. Raises DataError
    for a malformed row, and ConfigError for a language that is wanted and not there."""
    present = list(dict.fromkeys(code for _, code, *_ in rows))
    for code in request.languages:
        if code not in present:
            raise ConfigError(
                f"--languages={code}: not in the data{suggest(code, present)}; present are {', '.join(present)}"
            )
    wanted = request.languages or present
    images, positions, entries = ImagePool(), {}, {code: [] for code in wanted}
    for name, code, text, where in rows:
        if code not in entries:
            continue
        if not code:
            raise DataError(f"{where}: the language is empty; write its code")
        if name not in positions:
            positions[name] = images.add(request.find_image(folder, name, where), name)
        text = clean_caption(require({"caption": text}, "caption", str, where), where)
        entries[code].append((positions[name], text))
    if not positions:
        raise DataError(f"{request.folder}: no captions; restore the published files")
    languages = {}
    for code, of_language in entries.items():
        of_language.sort(key=lambda entry: entry[0])
        languages[code] = [text for _, text in of_language], np.array([image for image, _ in of_language])
    return LanguageTable(images.to_split(request.benchmark), languages)
