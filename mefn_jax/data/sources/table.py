"""A user's own data: tables of (image path, caption), as CSV with a header or as JSON lines.

One file a split, `train`, `val`, `test` with the ending `.csv` or `.jsonl`, in one folder; or one file with a column
`split`. Columns are `image` and `caption`; the captions of an image may stand anywhere, its first row gives the order.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from mefn_jax.data.parsing import clean_caption, find_image, read_text, require
from mefn_jax.data.split import SPLIT_ALIASES
from mefn_jax.errors import DataError

TABLE_SPLITS = ("train", "val", "test")


def read(path, images) -> tuple[dict[str, list[dict]], list[str]]:
    """Reads the file or folder `path`; image paths are relative to the folder `images`.

    Returns `(splits, notes)` as `karpathy.read` does. Raises DataError naming the file and the line that is wrong.
    """
    path, folder = Path(path), Path(images)
    if not folder.is_dir():
        raise DataError(f"--images={images}: no such directory; give the folder of the images")
    files = [(None, path)] if path.is_file() else _files(path)
    splits: dict[str, dict[str, dict]] = {}
    owner: dict[str, str] = {}
    for split, file in files:
        for where, row in _rows(file):
            name, text = require(row, "image", str, where), require(row, "caption", str, where)
            wanted = split or require(row, "split", str, where)
            wanted = SPLIT_ALIASES.get(wanted, wanted)
            if wanted not in TABLE_SPLITS:
                raise DataError(f"{where}: split {wanted!r} is none of {', '.join(TABLE_SPLITS)}")
            if owner.setdefault(name, wanted) != wanted:
                raise DataError(f"{where}: image {name!r} is in {owner[name]} already; an image belongs to one split")
            entries = splits.setdefault(wanted, {})
            if name not in entries:
                entries[name] = {"image": find_image(folder, name, where), "image_id": name, "captions": []}
            entries[name]["captions"].append(clean_caption(text, where))
    if not splits:
        raise DataError(f"{path}: no rows")
    return {split: list(splits[split].values()) for split in TABLE_SPLITS if split in splits}, []


def _files(folder: Path) -> list[tuple[str, Path]]:
    found = []
    for split in TABLE_SPLITS:
        of_split = [f for f in (folder / f"{split}.csv", folder / f"{split}.jsonl") if f.is_file()]
        if len(of_split) > 1:
            raise DataError(f"{folder}: both {of_split[0].name} and {of_split[1].name}; keep one")
        found += [(split, f) for f in of_split]
    if not found:
        raise DataError(f"{folder}: no train.csv or train.jsonl; --path takes their folder, or one file with `split`")
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Each row and where it stands, `file:line`."""
    text = read_text(path)
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise DataError(f"{path}:{number}: not JSON ({e})") from None
        return
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where}: not as many columns as the header ({', '.join(reader.fieldnames)})")
            yield where, row
    except csv.Error as e:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({e})") from None
