"""Shards of a source: parts that are read one by one, each by any process, with what is damaged in them named.

A source that is too large for memory lists its shards; each yields its images with their captions one after the other.
"""

import dataclasses
import functools
import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from PIL import Image

from mefn_jax.data.parsing import clean_caption
from mefn_jax.errors import DataError, reason

SPLITS = ("train", "val", "test")
# Other words for splits, in the names of files and folders and in columns.
SPLIT_WORDS = {word: word for word in SPLITS} | {
    "training": "train",
    "restval": "train",
    "dev": "val",
    "valid": "val",
    "validation": "val",
    "testing": "test",
}
# Whole names of columns that hold captions, without a number at their end and in lower case.
CAPTION_NAMES = ("caption", "captions", "text", "texts", "txt", "sentence", "sentences", "sentences_raw", "raw")
IMAGES_IN_SHARD = 2000  # of a source that lists its image files
LARGEST_IMAGE = 2**28  # bytes of an image file: more than any photograph has


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of a source's columns or keys; empty ones are found by the usual names.

    Attributes:
        image: the column of the image.
        captions: the columns of captions, in their order.
        image_id: the column of the image's id; ROW_NUMBERS for the number of the row.
    """

    image: str = ""
    captions: tuple[str, ...] = ()
    image_id: str = ""


@dataclasses.dataclass
class Example:
    """Image with its captions.

    Attributes:
        split: "train", "val" or "test".
        image: the bytes of the image file, unchanged.
        image_id: a name of the image.
        captions: the captions, with white space folded; at least one.
        scene: the ground truth of a drawn scene; None for photographs.
    """

    split: str
    image: bytes
    image_id: str
    captions: list[str]
    scene: dict | None = None


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something in a shard that cannot be used; the message names the place."""

    message: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part of a source. It is sent to the process that reads it.

    Attributes:
        name: its name in messages.
        split: the split of all its examples; None if each names its own.
        identity: JSON value that changes when the content or the way to read it does.
        read: returns an iterator of its examples and faults, always in the same order. It raises DataError where the
            shard cannot be read with these options.
    """

    name: str
    split: str | None
    identity: object
    read: Callable[[], Iterator[Example | Fault]]


def find_split(path: PurePosixPath) -> str | None:
    """Returns the split that the name of a file begins with (`train-00000-of-00003.parquet`), or else the nearest
    folder of a relative path is called by; None if there is none."""
    first = re.match(r"[a-z]*", path.name.lower())[0]
    words = [first, *(name.lower() for name in reversed(path.parts[:-1]))]
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def list_files(path: Path, suffixes: tuple[str, ...], hint: str) -> list[tuple[Path, PurePosixPath]]:
    """Returns the files below a folder whose names end with one of `suffixes`, sorted, each with its path relative to
    the folder; or `path` itself if it is a file. Hidden files and folders are left out. Raises DataError without any.
    """
    if path.is_file():
        return [(path, PurePosixPath(path.name))]
    if not path.is_dir():
        raise DataError(f"--path={path}: no such file or folder")
    relative = (p.relative_to(path) for p in path.rglob("*") if p.name.lower().endswith(suffixes) and p.is_file())
    visible = [PurePosixPath(p) for p in relative if not any(part.startswith(".") for part in p.parts)]
    if not visible:
        raise DataError(f"--path={path}: no {' or '.join(suffixes)} file in it; {hint}")
    return [(path / name, name) for name in sorted(visible)]


def name_without_suffix(name: PurePosixPath) -> str:
    """Returns a relative path up to the first dot of the file's name: `train/00000` of `train/00000.tar.gz`."""
    return str(name.with_name(name.name.split(".")[0] or name.name))


def stat_file(path: Path) -> list:
    """Returns the name, the size and the time of the last change of a file. Raises DataError if it is gone."""
    try:
        status = path.stat()
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or e}") from None
    return [str(path), status.st_size, status.st_mtime_ns]


def find_caption_columns(names: Iterable[str], columns: Columns, where: str) -> list[str]:
    """Returns the columns of captions: those that `columns` names, or the one with a usual name, or all with this name
    and a number (`caption_0`, `caption_1`, in the order of the numbers). Raises DataError if there is none, or several
    with different names."""
    names = list(names)
    if columns.captions:
        missing = [name for name in columns.captions if name not in names]
        if missing:
            raise DataError(f"{where}: no column {missing[0]!r}; present are {_join(names)}")
        return list(columns.captions)
    by_word: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        word, number = re.fullmatch(r"(.*?)_?([0-9]{0,9})", name.lower(), re.DOTALL).groups()
        if word in CAPTION_NAMES:
            by_word.setdefault(word, []).append((int(number or -1), name))
    if not by_word:
        raise DataError(f"{where}: no column of captions among {_join(names)}; name it by --caption_columns=NAME")
    if len(by_word) > 1:
        found = [name for group in by_word.values() for _, name in group]
        raise DataError(f"{where}: the captions may be in {_join(found)}; choose by --caption_columns=NAME")
    return [name for _, name in sorted(*by_word.values())]


def _join(names) -> str:
    return (", ".join(map(str, names))[:300] or "none").encode("utf-8", "backslashreplace").decode()


def gather_captions(values: Iterable[tuple[str, object]], where: str) -> list[str]:
    """Returns the captions of an image from the pairs (column, value), where a value is a text or a list of texts.
    Raises DataError, naming the column, if one is missing, empty, or no text."""
    captions = []
    for name, value in values:
        if value is None or (isinstance(value, list) and not value):
            raise DataError(f"{where}: no caption in {name!r}; write one or remove the entry")
        for k, text in enumerate(value if isinstance(value, list) else [value]):
            place = f"{where}: {name}[{k}]" if isinstance(value, list) else f"{where}: {name}"
            if text is None:
                raise DataError(f"{place}: no caption; write one or remove the entry")
            if not isinstance(text, str):
                raise DataError(f"{place}: a caption must be a text, found {str(text)[:60]!r}")
            captions.append(clean_caption(text, place))
    return captions


def check_image_id(image_id: str, where: str) -> str:
    """Returns the id of an image. Raises DataError if it is empty or cannot be stored as UTF-8."""
    if not image_id:
        raise DataError(f"{where}: the image's id is empty; name another column by --id_column")
    if re.search("[\ud800-\udfff]", image_id):
        raise DataError(f"{where}: the image's name is not UTF-8; correct it")
    return image_id


def check_example_image(data: bytes | None, where: str) -> bytes:
    """Returns the bytes of an image file. Raises DataError if Pillow does not recognize an image in them. Their header
    is read alone: whether all pixels can be decoded shows when they are needed (`data.skip_undecodable`)."""
    if not data:
        raise DataError(f"{where}: the image is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.size  # noqa: B018 (a plugin may read it late)
    except Exception as e:  # for damaged files, Pillow raises errors of any class
        cause = re.sub(r" *<[^>]* at 0x[0-9a-f]+>", "", reason(e))  # the same text in each process
        raise DataError(f"{where}: not an image ({cause})") from None
    return data


def list_image_shards(
    where: str, splits: dict[str, list[dict]], faults: list[str], checks_images: bool = False
) -> list[Shard]:
    """Returns the shards of listed image files: `splits` has the entries `{image: Path, image_id, captions}` of each
    split, `faults` what is wrong with others. `checks_images`: what is no image is a fault."""
    shards = []
    for split, entries in splits.items():
        for start in range(0, len(entries), IMAGES_IN_SHARD):
            chunk = entries[start : start + IMAGES_IN_SHARD]
            status = [[_stat_or_name(entry["image"]), entry["image_id"], entry["captions"]] for entry in chunk]
            read = functools.partial(_read_files, split, chunk, faults, checks_images)
            shards.append(Shard(f"{where}: {split} from image {start} on", split, [status, faults], read))
            faults = []
    return shards


def _stat_or_name(path: Path) -> list:
    try:
        return stat_file(path)
    except DataError:
        return [str(path)]


def _read_files(split: str, entries: list[dict], faults: list[str], checks: bool) -> Iterator[Example | Fault]:
    """Yields the faults, and the images of files."""
    yield from map(Fault, faults)
    for entry in entries:
        try:
            data = entry["image"].read_bytes()
            if checks:
                check_example_image(data, str(entry["image"]))
            yield Example(split, data, entry["image_id"], entry["captions"])
        except DataError as e:
            yield Fault(str(e))
        except OSError as e:
            yield Fault(f"{entry['image']}: cannot be read ({e.strerror or e})")
