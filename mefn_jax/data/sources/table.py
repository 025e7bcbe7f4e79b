"""Reader of a user's own data: tables of image path and caption, as CSV with a header or as JSON lines.

There is either one file for each split in a folder, `train`, `val` and `test` with the ending `.csv` or `.jsonl`, or
one file with a column `split`. The columns are `image` and `caption`. The captions of an image may stand anywhere in
its split, and images are ordered by their first row (docs/data.md, Table).
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from mefn_jax.data.parsing import ImageFiles, clean_caption, find_repeated, read_json_lines, read_text, require
from mefn_jax.data.split import SPLIT_ALIASES
from mefn_jax.errors import DataError

TABLE_SPLITS = ("train", "val", "test")


def read(path, images) -> tuple[dict[str, list[dict]], list[str]]:
    """Reads the file or folder `path`; image paths are relative to the folder `images`.

    Returns `(splits, notes)` as `karpathy.read` does. Raises DataError that names the file and the malformed line.
    """
    path, folder = Path(path), Path(images)
    if not folder.is_dir():
        raise DataError(f"--images={images}: no such directory; give the folder of the images")
    files = [(None, path)] if path.is_file() else _list_files(path)
    splits: dict[str, dict[str, dict]] = {}
    split_of_image: dict[str, str] = {}
    image_files = ImageFiles()
    for split, file in files:
        for where, row in read_rows(file):
            name, text = require(row, "image", str, where), require(row, "caption", str, where)
            row_split = split or require(row, "split", str, where)
            row_split = SPLIT_ALIASES.get(row_split, row_split)
            if row_split not in TABLE_SPLITS:
                raise DataError(f"{where}: split {row_split!r} is none of {', '.join(TABLE_SPLITS)}")
            if split_of_image.setdefault(name, row_split) != row_split:
                raise DataError(
                    f"{where}: image {name!r} is in {split_of_image[name]} already; an image belongs to one split"
                )
            entries = splits.setdefault(row_split, {})
            if name not in entries:
                entries[name] = {"image": image_files.find(folder, name, where), "image_id": name, "captions": []}
            entries[name]["captions"].append(clean_caption(text, where))
    if not splits:
        raise DataError(f"{path}: no rows")
    return {split: list(splits[split].values()) for split in TABLE_SPLITS if split in splits}, []


def _list_files(folder: Path) -> list[tuple[str, Path]]:
    """Returns the splits and their files. Raises DataError if there are none, or two of one split."""
    files = []
    for split in TABLE_SPLITS:
        candidates = [f for f in (folder / f"{split}.csv", folder / f"{split}.jsonl") if f.is_file()]
        if len(candidates) > 1:
            raise DataError(f"{folder}: both {candidates[0].name} and {candidates[1].name}; keep one")
        files += [(split, f) for f in candidates]
    if not files:
        raise DataError(f"{folder}: no train.csv or train.jsonl; --path takes their folder, or one file with `split`")
    return files


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields the place of each row, `file:line`, and the row."""
    yield from read_json_lines(path) if path.suffix == ".jsonl" else _read_csv_rows(path, read_text(path))


def _read_csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    """Yields the place of each row of a CSV file with a header, the line that it begins in, and the row."""
    rows, header, line_number = csv.reader(io.StringIO(text, newline=""), strict=True), None, 1
    try:
        for row in rows:
            where, line_number = f"{path}:{line_number}", rows.line_num + 1
            if not row:
                continue
            if header is None:
                header = row
                if repeated := find_repeated(name.strip() for name in header if name.strip()):
                    raise DataError(f"{where}: two columns are called {repeated!r}; rename or remove one")
            elif len(row) != len(header):
                raise DataError(f"{where}: the number of columns differs from the header ({', '.join(header)[:300]})")
            else:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as e:
        raise DataError(f"{path}:{line_number}: not CSV ({e}); is a quote missing?") from None
