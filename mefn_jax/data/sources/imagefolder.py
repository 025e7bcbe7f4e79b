"""Reader of Hugging Face's `imagefolder`: folders of images with `metadata.jsonl` or `metadata.csv`.

A row has `file_name`, relative to the folder of its table, and captions. A split is a folder on the way to the image,
or the value of a column `split` (docs/data.md, Image folder).
"""

from pathlib import Path, PurePosixPath

from mefn_jax.data.parsing import ImageFiles, require
from mefn_jax.data.sources.shard import (
    SPLIT_WORDS,
    Columns,
    Shard,
    check_image_id,
    find_caption_columns,
    find_split,
    gather_captions,
    list_files,
    list_image_shards,
)
from mefn_jax.data.sources.table import read_rows
from mefn_jax.errors import DataError

METADATA_FILES = ("metadata.jsonl", "metadata.csv")


def read(path, _, columns: Columns) -> tuple[list[Shard], list[str]]:
    """Reads the tables of metadata below the folder `path` and lists their images, in the order of the rows, in shards.
    Returns `(shards, notes)`. Raises DataError if there is no table, or one is malformed."""
    root, gathered, notes = Path(path), _Gathered(), []
    if not root.is_dir():
        raise DataError(f"--path={path}: no such folder")
    for table, _relative in list_files(
        root, METADATA_FILES, "--source=imagefolder needs it; --source=table reads others"
    ):
        if table.name not in METADATA_FILES:
            continue
        for where, row in read_rows(table):
            gathered.add_row(where, row, table.parent, root, columns)
    if gathered.num_unnamed:
        notes.append(f"{gathered.num_unnamed} images are in no folder of a split, and are training data")
    splits, faults = {name: list(entries.values()) for name, entries in gathered.splits.items()}, gathered.faults
    shards = list_image_shards(str(path), splits, faults, checks_images=True)
    if not shards and faults:
        raise DataError(f"{faults[0]}; no image is without a fault")
    if not shards:
        raise DataError(f"{path}: no rows of images in {' or '.join(METADATA_FILES)}")
    return shards, notes


class _Gathered:
    """Images of all tables with their captions.

    Attributes:
        splits: by split and by id, entries `{image: Path, image_id, captions}` in the order of their first rows.
        faults: what is wrong with the images that are left out.
        num_unnamed: the number of images that name no split.
    """

    def __init__(self):
        self.splits, self.faults, self.num_unnamed = {}, [], 0
        self._files, self._split_of, self._refused = ImageFiles(), {}, set()

    def add_row(self, where: str, row: dict, folder: Path, root: Path, columns: Columns) -> None:
        """Adds the captions of a row, or its fault; an image with a fault is left out with all its rows."""
        key = columns.image or "file_name"
        name = require(row, key, str, where)
        names = find_caption_columns((n for n in row if n not in (key, "split")), columns, where)
        image_id = str(PurePosixPath(folder.relative_to(root)) / name)
        if image_id in self._refused:
            return
        split = find_split(PurePosixPath("_") / PurePosixPath(image_id).parent / "_")
        try:
            if "split" in row:
                split = SPLIT_WORDS.get(str(row["split"]).lower())
                if split is None:
                    raise DataError(f"{where}: split {str(row['split'])[:60]!r} is none of train, val, test")
            captions = gather_captions([(n, row[n]) for n in names], where)
            if image_id not in self._split_of:
                check_image_id(image_id, where)
                file = self._files.find(root, image_id, where)
                self._split_of[image_id] = split or "train"
                self.num_unnamed += split is None
                entry = {"image": file, "image_id": image_id, "captions": []}
                self.splits.setdefault(split or "train", {})[image_id] = entry
            elif self._split_of[image_id] != (split or "train"):
                raise DataError(
                    f"{where}: image {name!r} is in {self._split_of[image_id]} already; keep it in one split"
                )
            self.splits[self._split_of[image_id]][image_id]["captions"] += captions
        except DataError as e:
            self.faults.append(str(e))
            self._refused.add(image_id)
            if image_id in self._split_of:
                del self.splits[self._split_of[image_id]][image_id]
