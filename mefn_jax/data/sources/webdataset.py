"""Reader of tars of samples as WebDataset and img2dataset write them: `KEY.jpg` with `KEY.txt` or `KEY.json`.

A tar is read once from its beginning to its end, compressed or not. Its members are only read: no file is ever created
under the name of one (docs/data.md, WebDataset).
"""

import functools
import tarfile
from collections.abc import Iterator
from pathlib import Path

from mefn_jax.data.parsing import parse_json
from mefn_jax.data.sources.shard import (
    LARGEST_IMAGE,
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

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
LARGEST_TAR = 2**36  # bytes of a compressed tar, when it is decompressed
LARGEST_TEXT = 2**22  # bytes of a file of captions
END = 1024  # zero bytes that end a tar


def read(path, _, columns: Columns) -> tuple[list[Shard], list[str]]:
    """Lists the tars below the folder `path`, or `path` itself. Returns `(shards, notes)`. Raises DataError if there
    are none."""
    shards, num_unnamed = [], 0
    for file, name in list_files(Path(path), TARS, "give the folder of the tars"):
        split = find_split(name)
        num_unnamed += split is None
        split, stem = split or "train", name_without_suffix(name)
        read_shard = functools.partial(read_tar, file, stem, split, columns)
        shards.append(Shard(str(file), split, [stat_file(file), [columns.image, columns.captions]], read_shard))
    return shards, [f"{num_unnamed} tars name no split, and are training data"] if num_unnamed else []


def read_tar(file: Path, stem: str, split: str, columns: Columns) -> Iterator[Example | Fault]:
    """Yields the samples of a tar and what is wrong in it. Members whose names are equal up to the first dot are a
    sample, and follow one another."""
    seen, sample = set(), None
    for member in _read_members(file, {*IMAGES, "txt", "json", columns.image}):
        if isinstance(member, Fault):
            yield member
            continue
        name, data = member
        key, suffix = _split_name(name)
        if sample is None or key != sample.key:
            if sample:
                yield sample.to_example(file, stem, split, columns)
            sample = _Sample(key, is_repeated=key in seen)
            seen.add(key)
        sample.add(suffix, name, data)
    if sample:
        yield sample.to_example(file, stem, split, columns)


class _Sample:
    """Files of a tar that belong together: by the ending of their names, the names and their content."""

    def __init__(self, key: str, is_repeated: bool):
        self.key, self.is_repeated, self.is_doubled, self.files = key, is_repeated, False, {}

    def add(self, suffix: str, name: str, data: bytes | DataError) -> None:
        """Adds a file: its bytes, or why it cannot be read."""
        self.is_doubled |= suffix in self.files
        self.files[suffix] = name, data

    def to_example(self, file: Path, stem: str, split: str, columns: Columns) -> Example | Fault:
        """Returns the example, or what is wrong."""
        where = f"{file}: {self.key!r}"
        try:
            if self.is_repeated or self.is_doubled:
                raise DataError(f"{where}: the key occurs a second time; give each sample its own")
            suffixes = [columns.image] if columns.image else [s for s in IMAGES if s in self.files]
            if len(suffixes) > 1:
                raise DataError(f"{where}: several images ({', '.join(suffixes)}); choose by --image_column")
            if not suffixes or suffixes[0] not in self.files:
                present = ", ".join(self.files)[:300]
                raise DataError(f"{where}: no image{self._explain(where)}; present are {present or 'none'}")
            name, data = self.files[suffixes[0]]
            image_id = check_image_id(f"{stem}/{name}", where)
            captions = self._read_captions(columns, where)
            return Example(split, check_example_image(_unwrap(data), where), image_id, captions)
        except DataError as e:
            return Fault(str(e))

    def _explain(self, where: str) -> str:
        """Returns why img2dataset has no image, from its JSON; empty if it is not known."""
        try:
            status = self._parse_json(where).get("status")
        except DataError:
            return ""
        return f" (status {status[:60]!r})" if isinstance(status, str) else ""

    def _parse_json(self, where: str) -> dict:
        """Returns the sample's JSON; an empty dict without one. Raises DataError if it is no object."""
        if "json" not in self.files:
            return {}
        value = parse_json(_decode(_unwrap(self.files["json"][1]), f"{where}: json"), f"{where}: json")
        if not isinstance(value, dict):
            raise DataError(f"{where}: json: expected an object, found {type(value).__name__}")
        return value

    def _read_captions(self, columns: Columns, where: str) -> list[str]:
        """Returns the captions: of the JSON if it has some or `columns` names them, else of the text file."""
        fields = self._parse_json(where)
        if not columns.captions and "txt" in self.files:
            try:
                names = find_caption_columns(fields, columns, where)
            except DataError:  # the JSON says other things
                return gather_captions([("txt", _decode(_unwrap(self.files["txt"][1]), f"{where}: txt"))], where)
        else:
            if "json" not in self.files:
                raise DataError(f"{where}: no caption; add {self.key}.txt or {self.key}.json")
            names = find_caption_columns(fields, columns, f"{where}: json")
        return gather_captions([(name, fields[name]) for name in names], f"{where}: json")


def _unwrap(data: bytes | DataError) -> bytes:
    if isinstance(data, DataError):
        raise data
    return data


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: not UTF-8 at byte {e.start}; convert it to UTF-8") from None


def _split_name(name: str) -> tuple[str, str]:
    """Returns the key of a member, its name up to the first dot of the last part, and the rest in lower case."""
    folder, _, base = name.rpartition("/")
    first, _, suffix = base.partition(".")
    return f"{folder}/{first}" if folder else first, suffix.lower()


def _read_members(file: Path, wanted: set[str]) -> Iterator[tuple[str, bytes | DataError] | Fault]:
    """Yields the names of the files of a tar and their content: a DataError if it is too large, b"" if the ending of
    the name is not wanted. Links, devices, names that leave the archive, and a cut end are faults."""
    try:
        # A size that is claimed but not there would be skipped in endless small steps.
        end = file.stat().st_size if _is_plain(file) else LARGEST_TAR
        with tarfile.open(file, "r|*", bufsize=2**16) as tar:
            for member in tar:
                tar.members = []  # the library would keep all of them
                name = member.name.removeprefix("./")
                where = f"{file}: {name!r}".encode("utf-8", "backslashreplace").decode()
                if member.offset_data + member.size > end:
                    raise DataError(f"{where}: cut (it claims {member.size:,} bytes); copy the file again")
                if member.isdir() or name.rpartition("/")[2].startswith("."):
                    continue
                if name.startswith("/") or ".." in name.split("/"):
                    yield Fault(f"{where}: the name leaves the archive; give names inside it")
                elif not member.isreg() or member.issparse():
                    yield Fault(f"{where}: a link or device, not a file; store the file itself")
                else:
                    is_wanted = _split_name(name)[1] in wanted
                    yield name, _read_file(tar, member, where) if is_wanted else b""
        _check_end(file)
    except DataError as e:
        yield Fault(str(e))
    except Exception as e:  # the errors of tarfile and of the decompressors, which are many
        yield Fault(f"{file}: cut or damaged ({reason(e)}); copy the file again")


def _read_file(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> bytes | DataError:
    """Returns the content of a member; an error if it is too large. Raises DataError if the tar ends before it does."""
    suffix = _split_name(member.name)[1]
    largest = LARGEST_TEXT if suffix in ("txt", "json") else LARGEST_IMAGE
    if member.size > largest:
        return DataError(f"{where}: {member.size:,} bytes, more than {largest:,}; remove it")
    data = tar.extractfile(member).read()
    if len(data) < member.size:
        raise DataError(f"{where}: cut after {len(data):,} of {member.size:,} bytes; copy the file again")
    return data


def _check_end(file: Path) -> None:
    """Raises DataError if a tar that is not compressed does not end as tars do: it was cut between two members."""
    if not _is_plain(file):
        return
    with file.open("rb") as stream:
        stream.seek(-min(END, file.stat().st_size), 2)
        if stream.read().strip(b"\0"):
            raise DataError(f"{file}: cut (it does not end as tars do); copy the file again")


def _is_plain(file: Path) -> bool:
    """Returns whether a tar is neither compressed nor older than the standard."""
    with file.open("rb") as stream:
        return stream.read(512)[257:262] == b"ustar"
