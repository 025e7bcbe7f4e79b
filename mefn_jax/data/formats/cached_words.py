"""Cached text: word states of a frozen text tower, written by `mefn_jax.precompute` and read in place of running it.

docs/data.md (Cached text) describes the files.
"""

import dataclasses
from pathlib import Path

import numpy as np

from mefn_jax.data import tokenizer
from mefn_jax.data.formats.precomputed import SPLIT_FILES
from mefn_jax.data.parsing import read_text
from mefn_jax.errors import DataError


@dataclasses.dataclass
class CachedText:
    """Cached words of a split's captions, memory-mapped. Caption c has rows `offsets[c] : offsets[c + 1]`.

    Attributes:
        path: the file of `features`, float16 `(all words, C)`.
        offsets: int64 `(captions + 1,)`, the number of words before each caption.
        length: M, the largest number of words that are read of a caption.
    """

    path: Path
    offsets: np.ndarray
    length: int

    def __post_init__(self):
        self.features = _map_array(self.path)

    def __getstate__(self):  # each reader process maps the file itself
        return self.path, self.offsets, self.length

    def __setstate__(self, state):
        self.__init__(*state)

    def __len__(self):
        return len(self.offsets) - 1

    @property
    def width(self) -> int:
        """Returns C, the width of a word's state."""
        return self.features.shape[1]

    def read(self, caption_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads captions by position `(B,)`: returns words float16 `(B, M, C)` and mask bool `(B, M)`. Raises DataError
        that names a caption whose words are not finite."""
        starts = self.offsets[caption_index]
        lengths = np.minimum(self.offsets[np.asarray(caption_index) + 1] - starts, self.length)
        word_index = np.arange(self.length)
        mask = word_index < lengths[:, None]
        words = np.zeros((*mask.shape, self.width), np.float16)
        words[mask] = self.features[(starts[:, None] + word_index)[mask]]
        if not np.isfinite(words).all():
            bad_caption = caption_index[int(np.argwhere(~np.isfinite(words))[0, 0])]
            raise DataError(f"{self.path}: the words of caption {bad_caption} have NaN or inf; make them again")
        return words, mask

    def take(self, start: int, stop: int) -> "CachedText":
        """Returns the cached text of the captions `start : stop`."""
        return CachedText(self.path, self.offsets[start : stop + 1], self.length)


def open_cached_text(directory, split: str, captions: list[str], length: int) -> CachedText:
    """Opens the cached text of a split in a directory written by `mefn_jax.precompute`.

    Raises DataError if files are missing or do not fit each other, or if they were made from other captions than
    `captions`.
    """
    prefix = Path(directory) / SPLIT_FILES.get(split, split)
    words_path, offsets_path = (Path(f"{prefix}_{name}.npy") for name in ("words", "word_offsets"))
    states, offsets = _map_array(words_path), np.array(_map_array(offsets_path))
    if states.ndim != 2 or states.dtype != np.float16:
        raise DataError(f"{words_path}: expected float16 (words, width), found {states.dtype} {states.shape}")
    is_ascending = offsets.ndim == 1 and offsets.dtype == np.int64 and len(offsets) and np.all(np.diff(offsets) >= 0)
    if not is_ascending or offsets[0] != 0 or offsets[-1] != len(states):
        raise DataError(f"{offsets_path}: does not fit {words_path.name}; make both again with mefn_jax.precompute")
    lines = read_text(Path(f"{prefix}_caps.txt")).removesuffix("\n").split("\n")
    expected = [" ".join(caption.split()) for caption in captions]
    if lines != expected or len(offsets) != len(expected) + 1:
        first_difference = next(
            (k for k, (a, b) in enumerate(zip(lines, expected, strict=False)) if a != b),
            min(map(len, (lines, expected))),
        )
        raise DataError(
            f"{prefix}_caps.txt: data.cached_text was made from {len(lines)} captions, which differ from the "
            f"{len(expected)} of data.dir's {split} from caption {first_difference} on; make them again with "
            "mefn_jax.precompute"
        )
    return CachedText(words_path, offsets, length)


def map_words(directory, split: str) -> np.ndarray:
    """Returns the states of all words of a split, float16 `(all words, C)`, mapped into memory. Raises DataError."""
    return _map_array(Path(f"{Path(directory) / SPLIT_FILES.get(split, split)}_words.npy"))


def cached_tokenizer_json(directory) -> str | None:
    """Returns the text of the tokenizer that the words were made with; None if the directory has none."""
    return tokenizer.read_tokenizer_json(directory) if (Path(directory) / tokenizer.TOKENIZER_FILE).is_file() else None


def _map_array(path: Path) -> np.ndarray:
    """Maps an array into memory. Raises DataError if it is missing or cannot be read."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(
            f"data.cached_text: {path}: no such file; write it with python -m mefn_jax.precompute"
        ) from None
    except (ValueError, OSError, EOFError) as e:
        raise DataError(f"{path}: cannot be read as an array ({e}); make it again with mefn_jax.precompute") from None
