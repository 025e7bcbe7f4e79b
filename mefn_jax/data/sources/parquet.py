"""Reader of Parquet shards as Hugging Face writes them: a row for each image, or for each caption of an image.

The column of the image holds `{bytes, path}`, bytes, or the path of a file; columns of captions hold a text or a list
of texts. Splits are those of a column `split`, or of the names of files and folders (docs/data.md, Parquet).
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mefn_jax.data.parsing import find_image
from mefn_jax.data.sources.shard import (
    SPLIT_WORDS,
    Columns,
    Example,
    Fault,
    Shard,
    check_example_image,
    check_image_id,
    find_caption_columns,
    find_split,
    gather_captions,
    list_files,
    name_without_suffix,
    stat_file,
)
from mefn_jax.errors import DataError, reason

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_path", "image_bytes")
FILE_NAMES = ("filename", "file_name")  # columns that name an image better than its path does
ID_NAMES = ("image_id", "img_id", "key", "id")  # columns that name an image without a path
ROW_NUMBERS = "row"  # the value of --id_column by which images are called by their shards and rows
ROWS_AT_ONCE = 16  # rows in memory
READ_AT_ONCE = 2**20  # bytes of a column that are read at once


def read(path, images, columns: Columns) -> tuple[list[Shard], list[str]]:
    """Lists the Parquet files below the folder `path`, or `path` itself; paths of images in them start from the folder
    `images`. Returns `(shards, notes)`. Raises DataError if there are none."""
    shards, num_unnamed = [], 0
    for file, name in list_files(Path(path), (".parquet",), "give the folder of the Parquet shards"):
        split = None
        if not _has_column(file, "split"):
            split = find_split(name)
            num_unnamed += split is None
            split = split or "train"
        options = [[*stat_file(file), str(images)], [columns.image, columns.captions, columns.image_id]]
        read_shard = functools.partial(read_rows_of_shard, file, name_without_suffix(name), split, images, columns)
        shards.append(Shard(str(file), split, options, read_shard))
    notes = [f"{num_unnamed} files name no split, and are training data"] if num_unnamed else []
    return shards, notes


def _has_column(file: Path, name: str) -> bool:
    """Returns whether a file has a column; False if its schema cannot be read."""
    try:
        return name in pq.read_schema(file, memory_map=False).names
    except Exception:  # `read_rows_of_shard` says why
        return False


def read_rows_of_shard(file: Path, stem: str, split: str | None, images, columns: Columns) -> Iterator[Example | Fault]:
    """Yields the images of a file and what is wrong in it. Rows that follow one another and have the same id and the
    same image are captions of one. Raises DataError if the columns cannot be used."""
    last = None
    for item in _read_rows(file, stem, split, Path(images), columns):
        if isinstance(item, Fault):
            yield item
        elif last and _is_continued(last, item, stem):
            last.captions.extend(item.captions)
        else:
            if last:
                yield last
            last = item
    if last:
        yield last


def _is_continued(last: Example, example: Example, stem: str) -> bool:
    """Returns whether an example is the image of the one before it, with other captions."""
    is_numbered = example.image_id.startswith(f"{stem}/")  # by rows, which always differ
    same_id = is_numbered or last.image_id == example.image_id
    return same_id and last.split == example.split and last.image == example.image


def _read_rows(file: Path, stem: str, split: str | None, images: Path, columns: Columns) -> Iterator[Example | Fault]:
    """Yields the example of each row, or what is wrong. Raises DataError if the columns cannot be used."""
    row = 0
    try:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_AT_ONCE) as table:
            layout = _Layout(table.schema_arrow, columns, stem, split, images, str(file))
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=layout.needed, use_threads=False):
                for k in range(batch.num_rows):
                    yield layout.read_row(batch, k, row)
                    row += 1
    except DataError:
        raise
    except Exception as e:  # Arrow raises errors of many classes for damaged files
        yield Fault(f"{file}: cut or damaged from row {row} on ({reason(e)}); copy the file again")


class _Layout:
    """The columns of a file: how its rows become examples.

    Attributes:
        needed: names of the columns that are read.
    """

    def __init__(self, schema: pa.Schema, columns: Columns, stem: str, split: str | None, images: Path, where: str):
        """Finds the columns. Raises DataError if one is missing, occurs twice or has another type."""
        self.stem, self.split, self.folder, self.where = stem, split, images, where
        self.image = _find_column(schema.names, columns.image, IMAGE_NAMES, "image", where)
        if self.image is None:
            raise DataError(f"{where}: no column of images; name it by --image_column=NAME")
        self.captions = find_caption_columns(schema.names, columns, where)
        self.ids = []  # columns that name the image, the best first; None stands for its path
        if columns.image_id != ROW_NUMBERS:
            usual = [_find_column(schema.names, "", names, "id", where) for names in (FILE_NAMES, ID_NAMES)]
            given = columns.image_id and _find_column(schema.names, columns.image_id, (), "id", where)
            self.ids = [given] if given else [*filter(None, usual[:1]), None, *filter(None, usual[1:])]
        self.needed = [self.image, *self.captions, *filter(None, self.ids), *([] if split else ["split"])]
        self.needed = list(dict.fromkeys(self.needed))
        for name in self.needed:
            if schema.names.count(name) > 1:
                raise DataError(f"{where}: two columns are called {name!r}; rename or remove one")
        kind = schema.field(self.image).type
        if not (_is_image_struct(kind) or _is_binary(kind) or _is_text(kind)):
            raise DataError(f"{where}: column {self.image!r} is {kind}; it must hold bytes, paths or {{bytes, path}}")
        for name in self.captions:
            kind = schema.field(name).type
            if not _is_text(kind) and not (_is_list(kind) and _is_text(kind.value_type)):
                raise DataError(f"{where}: column {name!r} is {kind}; it must hold a text or a list of texts")

    def read_row(self, batch: pa.RecordBatch, k: int, row: int) -> Example | Fault:
        """Returns the example of row k of a batch, which is row `row` of the file, or what is wrong in it."""
        where = f"{self.where}: row {row}"
        try:
            values = {name: _read_value(batch.column(j)[k], name, where) for j, name in enumerate(batch.schema.names)}
            split = self.split or SPLIT_WORDS.get(str(values["split"]).lower())
            if split is None:
                raise DataError(f"{where}: split {str(values['split'])[:60]!r} is none of train, val, test")
            data, path = self._read_image(values[self.image], where)
            names = (path if column is None else values[column] for column in self.ids)
            image_id = next((str(name) for name in names if name not in (None, "")), f"{self.stem}/{row}")
            captions = gather_captions([(name, values[name]) for name in self.captions], where)
            return Example(split, check_example_image(data, where), check_image_id(image_id, where), captions)
        except DataError as e:
            return Fault(str(e))

    def _read_image(self, value, where: str) -> tuple[bytes | None, str | None]:
        """Returns the bytes of an image, and its path if it has one. Raises DataError if its file does not exist."""
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, str):
            data, path = None, data
        if data is None and path:
            try:
                data = find_image(self.folder, path, where).read_bytes()
            except OSError as e:
                raise DataError(f"{where}: image {path!r} cannot be read ({e.strerror or e})") from None
        return data, path


def _find_column(names: list[str], given: str, usual: tuple[str, ...], option: str, where: str) -> str | None:
    """Returns the column that is given, or the first with a usual name; None without one. Raises DataError if the given
    one is missing."""
    if given:
        if given not in names:
            raise DataError(f"{where}: --{option}_column={given}: no such column; present are {', '.join(names)[:300]}")
        return given
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def _read_value(scalar: pa.Scalar, name: str, where: str):
    """Returns a value as a Python object. Raises DataError if it is a text that is not UTF-8."""
    try:
        return scalar.as_py()
    except (UnicodeDecodeError, pa.ArrowException) as e:
        raise DataError(f"{where}: {name!r} cannot be read ({reason(e)})") from None


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_image_struct(kind: pa.DataType) -> bool:
    """Returns whether a column has Hugging Face's type of images, `{bytes, path}`, of which one may be missing."""
    if not pa.types.is_struct(kind):
        return False
    kinds = {field.name: field.type for field in kind}
    usable = {"bytes": _is_binary, "path": _is_text}
    # A column of nulls alone has the type null.
    return any(n in kinds for n in usable) and all(
        usable[n](t) or pa.types.is_null(t) for n, t in kinds.items() if n in usable
    )
