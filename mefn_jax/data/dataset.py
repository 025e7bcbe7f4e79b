"""Opens a directory of data, whatever it is: prepared by this project, TFDS coco_captions, or precomputed regions."""

from pathlib import Path

from mefn_jax.config import suggest
from mefn_jax.data.formats import cached_words
from mefn_jax.data.formats.coco_captions import COCO_CAPTIONS, CocoCaptions
from mefn_jax.data.formats.precomputed import Precomputed
from mefn_jax.data.formats.prepared import Prepared
from mefn_jax.data.parsing import read_json, require
from mefn_jax.data.split import Split
from mefn_jax.errors import DataError

ALIASES = {"dev": "val"}
HELD_OUT = "held_out"  # images of train that choices are made on
HOW_TO_MAKE = "make one with python -m mefn_jax.data.prepare"


class Dataset:
    """A directory of data: its splits, and what is known of how its tokenizer was made (`facts`)."""

    def __init__(self, directory, skip_bad: bool = False, hold_out: int = 0, words: str = "", max_words: int = 0):
        """Opens it. The last `hold_out` images of train are the split `held_out` instead; `words` is a directory of
        cached words (`cached_words.py`), of which `max_words` a caption are read. Raises DataError if the data is
        missing, or none of the kinds that can be read."""
        self.directory = Path(directory)
        self.hold_out, self.words, self.max_words = hold_out, words, max_words
        if not self.directory.is_dir():
            raise DataError(f"data.dir: {directory}: no such directory; {HOW_TO_MAKE}")
        if any(self.directory.glob("*_ims.npy")):
            self._kind = Precomputed(self.directory, skip_bad)
        elif not (self.directory / "dataset_info.json").is_file():
            raise DataError(
                f"data.dir: {directory}: not a data set (neither dataset_info.json nor *_ims.npy in it); {HOW_TO_MAKE}"
            )
        elif _tfds_name(self.directory) == COCO_CAPTIONS:
            self._kind = CocoCaptions(self.directory, skip_bad)
        else:
            self._kind = Prepared(self.directory, skip_bad)
        self.facts = self._kind.facts

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return (*self._kind.splits, *([HELD_OUT] if self.hold_out else []))

    @property
    def tokenizer_json(self) -> str | None:
        """The text of the data set's `tokenizer.json`, or of its cached words'; None if it comes without one."""
        return cached_words.cached_tokenizer_json(self.words) if self.words else self._kind.tokenizer_json

    def split(self, name: str) -> Split:
        """The split `name` (`dev` means `val`). Raises DataError naming those present if it is missing."""
        name = ALIASES.get(name, name)
        if name not in self.splits:
            raise DataError(
                f"{self.directory}: no split {name!r}{suggest(name, self.splits)}; present are {', '.join(self.splits)}"
            )
        if self.hold_out and name in ("train", HELD_OUT):
            return self._part_of_train(name)
        return self._whole(name)

    def _whole(self, name: str) -> Split:
        split = self._kind.split(name)
        if not split.images:
            raise DataError(f"{self.directory}: no image of {name} can be used; make the data set again")
        if self.words:
            split.words = cached_words.open_cached_text(self.words, name, split.texts(), self.max_words)
        return split

    def _part_of_train(self, name: str) -> Split:
        whole = self._whole("train")
        if self.hold_out >= whole.images:
            raise DataError(f"data.hold_out={self.hold_out}: train has {whole.images} images, and some must be left")
        cut = whole.images - self.hold_out
        return whole.part(name, 0, cut) if name == "train" else whole.part(name, cut, whole.images)


def _tfds_name(directory: Path) -> str:
    path = directory / "dataset_info.json"
    return require(read_json(path), "name", str, str(path))
