"""Precomputed regions as SCAN and VSE++ have them: `{train,dev,test,...}_ims.npy`, `_caps.txt`, `_ids.txt`
(PEERS.md 1), used as they are.

`_ims.npy` is (rows, N, C) or (rows, C), one region a row, of any real dtype. With five times as many captions as rows,
image k has captions 5 k to 5 k + 4. With as many captions as rows an image's row is repeated for each of its captions:
which rows are one image is said by `_ids.txt` where it repeats ids, else they come in fives; if the first five rows
differ, each row is an image with one caption. Rows that should be one image are compared, a thousand images at most.
"""

import dataclasses
import itertools
import mmap
from pathlib import Path

import numpy as np

from mefn_jax.data import tokenizer
from mefn_jax.data.parsing import clean_caption, read_text
from mefn_jax.data.split import Split
from mefn_jax.errors import DataError

SPLIT_FILES = {"val": "dev"}  # SCAN's name of a split, where it differs
COMPARED = 1000  # images whose repeated rows are compared when a split is opened
MAPPED_BYTES = 3 * 2**28  # read through the map before its pages are let go, as they count as ours


class RegionFile:
    """The rows of an `_ims.npy`, memory-mapped; each process that reads opens it anew."""

    def __init__(self, path: Path):
        """Maps the file. Raises DataError if it is no array of numbers that can be mapped."""
        self.path = path
        try:
            self._map = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file") from None
        except Exception as e:  # a damaged header can end in any
            raise DataError(
                f"{path}: not a NumPy array of numbers that can be mapped; objects are pickles, which are refused"
            ) from e
        if not isinstance(self._map, np.memmap) or self._map.dtype.kind not in "fiu":
            raise DataError(f"{path}: expected numbers, found {getattr(self._map, 'dtype', 'an archive of arrays')}")
        if self._map.ndim not in (2, 3) or not self._map.size:
            raise DataError(f"{path}: the shape {self._map.shape} is neither (rows, regions, width) nor (rows, width)")
        if not self._map.flags.c_contiguous:
            raise DataError(
                f"{path}: in Fortran order, in which a row lies all over the file; save np.ascontiguousarray"
            )
        # A plain array of the map: taking a row of a memmap costs as much as reading a small one.
        self._rows = np.asarray(self._map).reshape(len(self._map), -1, self._map.shape[-1])
        self._checked, self._read = np.zeros(len(self._map), bool), 0

    def __getstate__(self):  # a map would be sent with everything in it
        return self.path

    def __setstate__(self, path: Path):
        self.__init__(path)

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, row: int) -> np.ndarray:
        """Row `row` as it is in the file, (N, C), not yet read."""
        return self._rows[row]

    @property
    def width(self) -> int:
        """C, the width of a region."""
        return self._rows.shape[-1]

    def read(self, rows) -> np.ndarray:
        """Rows as float32, or float16 where the file has it, `(B, N, C)`. Raises DataError naming a row that is not
        finite."""
        rows = np.asarray(rows)
        with np.errstate(over="ignore"):  # of wider numbers; found below
            out = self._rows[rows].astype(np.float16 if self._map.dtype == np.float16 else np.float32, copy=False)
        for k in np.flatnonzero(~self._checked[rows]):  # once is enough
            if not _finite(out[k]):
                raise DataError(f"{self.path}: row {rows[k]} has NaN or inf; make the features again")
            self._checked[rows[k]] = True
        self._read += out.size * self._rows.itemsize
        if self._read > MAPPED_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._read = 0
            self._map.base.madvise(mmap.MADV_DONTNEED)
        return out


def _finite(x: np.ndarray) -> bool:
    if x.dtype == np.float32:
        flat = x.ravel()
        with np.errstate(over="ignore"):
            if np.isfinite(flat @ flat):  # several times faster than asking each number, and sure if it says yes
                return True
    return bool(np.isfinite(x).all())


@dataclasses.dataclass
class RegionRecords:
    """Rows with their images' captions, as `Split` wants them."""

    regions: RegionFile
    captions: list[list[str]]  # of each image
    ids: list[str]
    rows: np.ndarray  # of each image

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, image: int) -> dict:
        row = int(self.rows[image])
        captions = self.captions[image]
        return {"regions": self.regions[row], "captions": captions, "image_id": self.ids[image], "scene": None}

    def read(self, images) -> np.ndarray:
        """The regions of images, `(B, N, C)`; see `Regions.read`."""
        return self.regions.read(self.rows[images])


class Precomputed:
    """The splits of a directory of precomputed regions."""

    def __init__(self, directory: Path, skip_undecodable: bool = False):
        """Looks what is there; files are opened by `split`."""
        self.directory, self.skip_undecodable, self.metadata = directory, skip_undecodable, {}
        ours = {file: name for name, file in SPLIT_FILES.items()}
        names = sorted(path.name.removesuffix("_ims.npy") for path in directory.glob("*_ims.npy"))
        if set(names) & set(SPLIT_FILES):
            raise DataError(
                f"{directory}: name the files of val dev_ims.npy, dev_caps.txt and dev_ids.txt, as SCAN does"
            )
        self.splits = tuple(ours.get(name, name) for name in names)

    @property
    def tokenizer_json(self) -> str | None:
        """The text of the directory's `tokenizer.json`; None if it has none."""
        return (
            tokenizer.read_tokenizer_json(self.directory)
            if (self.directory / tokenizer.TOKENIZER_FILE).is_file()
            else None
        )

    def split(self, name: str) -> Split:
        """The split `name`, one of `splits`. Raises DataError where the files do not fit each other."""
        prefix = self.directory / SPLIT_FILES.get(name, name)
        regions = RegionFile(Path(f"{prefix}_ims.npy"))
        captions_path, ids_path = (Path(f"{prefix}_{name}.txt") for name in ("caps", "ids"))
        captions = [clean_caption(line, f"{captions_path}:{n}") for n, line in enumerate(_lines(captions_path), 1)]
        ids = [line.strip() for line in _lines(ids_path)] if ids_path.is_file() else []
        if ids and len(ids) not in (len(regions), len(captions)):
            raise DataError(f"{ids_path}: {len(ids)} ids, for {len(regions)} rows and {len(captions)} captions")
        rows, first = _images(regions, captions, ids, prefix)
        at = first if len(ids) == len(captions) else rows
        of_image = [str(k) for k in range(len(rows))] if not ids else [ids[at[k]] for k in range(len(rows))]
        records = RegionRecords(regions, [captions[a:b] for a, b in itertools.pairwise(first)], of_image, rows)
        bad = _not_finite(records) if self.skip_undecodable else []
        kept = np.delete(np.arange(len(records)), bad)
        first = np.concatenate([[0], np.cumsum(np.diff(first)[kept])])
        return Split(name, records, kept, first, [of_image[k] for k in bad], regions.width)


def _lines(path: Path) -> list[str]:
    text = read_text(path)
    return text.removesuffix("\n").split("\n") if text else []


def _images(regions: RegionFile, captions: list[str], ids: list[str], prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each image `(I,)`, and the number of captions before each `(I + 1,)`."""
    rows, number = len(regions), len(captions)
    if number == 5 * rows:
        return np.arange(rows), np.arange(0, number + 1, 5)
    if number != rows:
        raise DataError(
            f"{prefix}_ims.npy has {rows} rows, {prefix.name}_caps.txt {number} captions; there must be five captions "
            "a row, or one"
        )
    starts = [k for k in range(rows) if k == 0 or not ids or ids[k] != ids[k - 1]]
    if ids and len({ids[k] for k in starts}) < len(starts):
        raise DataError(f"{prefix}_ids.txt: an id stands in several places; an image's rows must follow one another")
    if len(starts) == rows and rows % 5 == 0 and all(_same(regions, 0, k) for k in range(5)):
        starts = list(range(0, rows, 5))
    first = np.array([*starts, rows])
    for k in np.unique(np.linspace(0, len(starts) - 1, COMPARED).astype(int)).tolist():
        if not _same(regions, first[k], first[k + 1] - 1):
            raise DataError(
                f"{prefix}_ims.npy: rows {first[k]} and {first[k + 1] - 1} should be one image's, but differ; "
                "put right which rows are repeated, or the ids"
            )
    return first[:-1], first


def _same(regions: RegionFile, row: int, other: int) -> bool:
    """Whether two rows are equal, NaN too."""
    return regions[row].tobytes() == regions[other].tobytes()


def _not_finite(records: RegionRecords) -> list[int]:
    """The images whose regions are not finite; reads every one."""
    bad = []
    for k in range(len(records)):
        try:
            records.read([k])
        except DataError:
            bad.append(k)
    return bad
