"""Words that `mefn_jax.precompute` has written: the states of a frozen text tower, read in place of running it."""

import dataclasses
from pathlib import Path

import numpy as np

from mefn_jax.data import tokenizer
from mefn_jax.data.formats.precomputed import SPLIT_FILES
from mefn_jax.data.parsing import read_text
from mefn_jax.errors import DataError


@dataclasses.dataclass
class CachedText:
    """The words of a split's captions, memory-mapped: caption c has rows `offsets[c] : offsets[c + 1]`.

    Attributes:
        path: the file of `features`, float16 `(all words, C)`.
        offsets: int64 `(captions + 1,)`.
        length: M, the most words that are read of a caption.
    """

    path: Path
    offsets: np.ndarray
    length: int

    def __post_init__(self):
        self.features = _mapped(self.path)

    def __getstate__(self):  # a process that reads maps the file for itself
        return self.path, self.offsets, self.length

    def __setstate__(self, state):
        self.__init__(*state)

    def __len__(self):
        return len(self.offsets) - 1

    @property
    def width(self) -> int:
        """C, the width of a word's state."""
        return self.features.shape[1]

    def read(self, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Words float16 `(B, M, C)` and mask bool `(B, M)` of captions by position `(B,)`. Raises DataError naming the
        caption whose words are not finite."""
        first = self.offsets[captions]
        numbers = np.minimum(self.offsets[np.asarray(captions) + 1] - first, self.length)
        places = np.arange(self.length)
        mask = places < numbers[:, None]
        words = np.zeros((*mask.shape, self.width), np.float16)
        words[mask] = self.features[(first[:, None] + places)[mask]]
        if not np.isfinite(words).all():
            bad = captions[int(np.argwhere(~np.isfinite(words))[0, 0])]
            raise DataError(f"{self.path}: the words of caption {bad} have NaN or inf; make them again")
        return words, mask

    def take(self, start: int, stop: int) -> "CachedText":
        """The captions `start : stop` alone."""
        return CachedText(self.path, self.offsets[start : stop + 1], self.length)


def open_cached_text(directory, split: str, captions: list[str], length: int) -> CachedText:
    """The cached words of a split, in a directory that `mefn_jax.precompute` has written.

    Raises DataError where files are missing, do not fit each other, or were made of other captions than `captions`.
    """
    prefix = Path(directory) / SPLIT_FILES.get(split, split)
    words_path, offsets_path = (Path(f"{prefix}_{name}.npy") for name in ("words", "word_offsets"))
    states, offsets = _mapped(words_path), np.array(_mapped(offsets_path))
    if states.ndim != 2 or states.dtype != np.float16:
        raise DataError(f"{words_path}: expected float16 (words, width), found {states.dtype} {states.shape}")
    rising = offsets.ndim == 1 and offsets.dtype == np.int64 and len(offsets) and np.all(np.diff(offsets) >= 0)
    if not rising or offsets[0] != 0 or offsets[-1] != len(states):
        raise DataError(f"{offsets_path}: does not fit {words_path.name}; make both again with mefn_jax.precompute")
    lines = read_text(Path(f"{prefix}_caps.txt")).removesuffix("\n").split("\n")
    wanted = [" ".join(caption.split()) for caption in captions]
    if lines != wanted or len(offsets) != len(wanted) + 1:
        at = next(
            (k for k, (a, b) in enumerate(zip(lines, wanted, strict=False)) if a != b), min(map(len, (lines, wanted)))
        )
        raise DataError(
            f"{prefix}_caps.txt: data.cached_text has the words of {len(lines)} captions, which differ from the "
            f"{len(wanted)} of data.dir's {split} from caption {at} on; make them again with mefn_jax.precompute"
        )
    return CachedText(words_path, offsets, length)


def cached_tokenizer_json(directory) -> str | None:
    """The text of the tokenizer that the words were made with; None if it is not there."""
    return tokenizer.read_tokenizer_json(directory) if (Path(directory) / tokenizer.TOKENIZER_FILE).is_file() else None


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(
            f"data.cached_text: {path}: no such file; write it with python -m mefn_jax.precompute"
        ) from None
    except (ValueError, OSError, EOFError) as e:
        raise DataError(f"{path}: cannot be read as an array ({e}); make it again with mefn_jax.precompute") from None
