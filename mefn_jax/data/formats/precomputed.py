"""Reader of precomputed regions in the format of SCAN and VSE++ (docs/data.md, Precomputed regions).

A split has the files `{train,dev,test,...}_ims.npy`, `_caps.txt` and, optionally, `_ids.txt`. `_ims.npy` has the shape
`(rows, N, C)`, or `(rows, C)` for one region in each row, and any real dtype. Rows and captions are matched like this:

1. Five times as many captions as rows: image k has captions 5k to 5k + 4.
2. As many captions as rows: each image's row is repeated once for each of its captions. The images are the runs of
   equal ids if `_ids.txt` repeats ids, else every five rows. If the first five rows differ, every row is an image of
   its own with one caption.

Rows that should belong to the same image are compared, for up to 1,000 images.
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

SPLIT_FILES = {"val": "dev"}  # SCAN's names of splits, where they differ from ours
COMPARED = 1000  # largest number of images whose repeated rows are compared when a split is opened
# Bytes that are read through a map before its pages are released: they count as memory of the process.
MAPPED_BYTES = 3 * 2**28


class RegionFile:
    """Rows of an `_ims.npy`, memory-mapped. Each reader process opens the file itself."""

    def __init__(self, path: Path):
        """Maps the file. Raises DataError if it is not an array of numbers in C order that can be mapped."""
        self.path = path
        try:
            self._map = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file") from None
        except Exception as e:  # a damaged header can raise any error
            raise DataError(
                f"{path}: not a NumPy array of numbers that can be mapped; save it with np.save (arrays of objects are "
                "pickles, which are refused)"
            ) from e
        if not isinstance(self._map, np.memmap) or self._map.dtype.kind not in "fiu":
            raise DataError(f"{path}: expected numbers, found {getattr(self._map, 'dtype', 'an archive of arrays')}")
        if self._map.ndim not in (2, 3) or not self._map.size:
            raise DataError(f"{path}: the shape {self._map.shape} is neither (rows, regions, width) nor (rows, width)")
        if not self._map.flags.c_contiguous:
            raise DataError(
                f"{path}: in Fortran order, where a row is scattered over the file; save np.ascontiguousarray of it"
            )
        # A plain array on the map, because indexing a memmap costs as much time as reading a small row.
        self._rows = np.asarray(self._map).reshape(len(self._map), -1, self._map.shape[-1])
        self._checked, self._read = np.zeros(len(self._map), bool), 0

    def __getstate__(self):  # pickling a map would copy all of its content
        return self.path

    def __setstate__(self, path: Path):
        self.__init__(path)

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, row: int) -> np.ndarray:
        """Returns row `row` as it is in the file, `(N, C)`, without reading or checking it."""
        return self._rows[row]

    @property
    def width(self) -> int:
        """Returns C, the width of a region."""
        return self._rows.shape[-1]

    def read(self, rows) -> np.ndarray:
        """Reads rows as float32, or float16 if the file has it, `(B, N, C)`. Raises DataError that names a row that is
        not finite."""
        rows = np.asarray(rows)
        with np.errstate(over="ignore"):  # float64 may overflow; the check below detects it
            regions = self._rows[rows].astype(np.float16 if self._map.dtype == np.float16 else np.float32, copy=False)
        for k in np.flatnonzero(~self._checked[rows]):  # each row is checked once
            if not _is_finite(regions[k]):
                raise DataError(f"{self.path}: row {rows[k]} has NaN or inf; make the features again")
            self._checked[rows[k]] = True
        self._read += regions.size * self._rows.itemsize
        if self._read > MAPPED_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._read = 0
            self._map.base.madvise(mmap.MADV_DONTNEED)
        return regions


def _is_finite(x: np.ndarray) -> bool:
    """Returns whether all numbers of an array are finite."""
    if x.dtype == np.float32:
        flat = x.ravel()
        with np.errstate(over="ignore"):
            # If the sum of squares is finite, so is every number; this is several times faster than testing each.
            if np.isfinite(flat @ flat):
                return True
    return bool(np.isfinite(x).all())


@dataclasses.dataclass
class RegionRecords:
    """Records of images, in the form that `Split` needs.

    Attributes:
        regions: the rows of regions.
        captions: the captions of each image.
        ids: the id of each image.
        rows: int64 `(I,)`, the row of each image.
    """

    regions: RegionFile
    captions: list[list[str]]
    ids: list[str]
    rows: np.ndarray

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, image: int) -> dict:
        row = int(self.rows[image])
        captions = self.captions[image]
        return {"regions": self.regions[row], "captions": captions, "image_id": self.ids[image], "scene": None}

    def read(self, images) -> np.ndarray:
        """Reads the regions of images, `(B, N, C)`; see `RegionFile.read`."""
        return self.regions.read(self.rows[images])


class Precomputed:
    """Splits of a directory of precomputed regions."""

    def __init__(self, directory: Path, skip_undecodable: bool = False):
        """Lists the splits; their files are opened by `split`. Raises DataError if val's files are not called dev."""
        self.directory, self.skip_undecodable, self.metadata = directory, skip_undecodable, {}
        split_names = {file: name for name, file in SPLIT_FILES.items()}
        names = sorted(path.name.removesuffix("_ims.npy") for path in directory.glob("*_ims.npy"))
        if set(names) & set(SPLIT_FILES):
            raise DataError(
                f"{directory}: rename the files of val to dev_ims.npy, dev_caps.txt and dev_ids.txt, as in SCAN"
            )
        self.splits = tuple(split_names.get(name, name) for name in names)

    @property
    def tokenizer_json(self) -> str | None:
        """Returns the text of the directory's `tokenizer.json`; None without one."""
        return (
            tokenizer.read_tokenizer_json(self.directory)
            if (self.directory / tokenizer.TOKENIZER_FILE).is_file()
            else None
        )

    def split(self, name: str) -> Split:
        """Returns the split `name`, one of `splits`. Raises DataError if its files do not fit each other."""
        prefix = self.directory / SPLIT_FILES.get(name, name)
        regions = RegionFile(Path(f"{prefix}_ims.npy"))
        captions_path, ids_path = (Path(f"{prefix}_{name}.txt") for name in ("caps", "ids"))
        captions = [clean_caption(line, f"{captions_path}:{n}") for n, line in enumerate(_read_lines(captions_path), 1)]
        ids = [line.strip() for line in _read_lines(ids_path)] if ids_path.is_file() else []
        if ids and len(ids) not in (len(regions), len(captions)):
            raise DataError(
                f"{ids_path}: {len(ids)} ids, but {len(regions)} rows and {len(captions)} captions; give one id for "
                "each row, or for each caption"
            )
        rows, caption_offsets = _match_images(regions, captions, ids, prefix)
        id_positions = caption_offsets if len(ids) == len(captions) else rows
        image_ids = [str(k) for k in range(len(rows))] if not ids else [ids[id_positions[k]] for k in range(len(rows))]
        records = RegionRecords(
            regions, [captions[a:b] for a, b in itertools.pairwise(caption_offsets)], image_ids, rows
        )
        skipped = _find_not_finite(records) if self.skip_undecodable else []
        kept = np.delete(np.arange(len(records)), skipped)
        caption_offsets = np.concatenate([[0], np.cumsum(np.diff(caption_offsets)[kept])])
        return Split(name, records, kept, caption_offsets, [image_ids[k] for k in skipped], regions.width)


def _read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file."""
    text = read_text(path)
    return text.removesuffix("\n").split("\n") if text else []


def _match_images(
    regions: RegionFile, captions: list[str], ids: list[str], prefix: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first row of each image `(I,)`, and the number of captions before each image `(I + 1,)`.

    Raises DataError if rows and captions cannot be matched.
    """
    num_rows, num_captions = len(regions), len(captions)
    if num_captions == 5 * num_rows:
        return np.arange(num_rows), np.arange(0, num_captions + 1, 5)
    if num_captions != num_rows:
        raise DataError(
            f"{prefix}_ims.npy has {num_rows} rows, {prefix.name}_caps.txt {num_captions} captions; give five captions "
            "for each row, or one"
        )
    starts = [k for k in range(num_rows) if k == 0 or not ids or ids[k] != ids[k - 1]]
    if ids and len({ids[k] for k in starts}) < len(starts):
        raise DataError(f"{prefix}_ids.txt: an id stands in several places; put the rows of an image one after another")
    if len(starts) == num_rows and num_rows % 5 == 0 and all(_are_equal(regions, 0, k) for k in range(5)):
        starts = list(range(0, num_rows, 5))
    offsets = np.array([*starts, num_rows])
    for k in np.unique(np.linspace(0, len(starts) - 1, COMPARED).astype(int)).tolist():
        if not _are_equal(regions, offsets[k], offsets[k + 1] - 1):
            raise DataError(
                f"{prefix}_ims.npy: rows {offsets[k]} and {offsets[k + 1] - 1} should belong to one image, but differ; "
                "correct which rows are repeated, or the ids"
            )
    return offsets[:-1], offsets


def _are_equal(regions: RegionFile, row: int, other: int) -> bool:
    """Returns whether two rows are equal, byte for byte (so that NaN equals NaN)."""
    return regions[row].tobytes() == regions[other].tobytes()


def _find_not_finite(records: RegionRecords) -> list[int]:
    """Returns the images whose regions are not finite; reads all of them."""
    images = []
    for k in range(len(records)):
        try:
            records.read([k])
        except DataError:
            images.append(k)
    return images
