"""Data set in a directory of any format: prepared by this project, TFDS coco_captions, or precomputed regions."""

from pathlib import Path

from mefn_jax.config import suggest
from mefn_jax.data.formats import cached_words
from mefn_jax.data.formats.coco_captions import COCO_CAPTIONS, CocoCaptions
from mefn_jax.data.formats.precomputed import Precomputed
from mefn_jax.data.formats.prepared import Prepared
from mefn_jax.data.parsing import read_json, require
from mefn_jax.data.split import SPLIT_ALIASES, Split
from mefn_jax.errors import DataError

HELD_OUT = "held_out"  # the split of training images that are set aside to choose settings on
HOW_TO_MAKE = "make one with python -m mefn_jax.data.prepare"


class Dataset:
    """Data set in a directory: its splits, its tokenizer, and its `metadata`, which say how it was made."""

    def __init__(
        self,
        directory,
        skip_undecodable: bool = False,
        held_out_images: int = 0,
        cached_text: str = "",
        max_tokens: int = 0,
    ):
        """Opens the directory.

        Args:
            directory: the directory.
            skip_undecodable: leaves out images that cannot be decoded, or regions that are not finite, instead of
                raising DataError when they are read.
            held_out_images: the number of images at the end of train that form the split `held_out` instead.
            cached_text: directory of cached text (`cached_words.py`); "" for none.
            max_tokens: the largest number of cached words to read of a caption.

        Raises DataError if the directory is missing, or its format is not supported.
        """
        self.directory = Path(directory)
        self.held_out_images, self.cached_text, self.max_tokens = held_out_images, cached_text, max_tokens
        if not self.directory.is_dir():
            raise DataError(f"data.dir: {directory}: no such directory; {HOW_TO_MAKE}")
        if any(self.directory.glob("*_ims.npy")):
            self._source = Precomputed(self.directory, skip_undecodable)
        elif not (self.directory / "dataset_info.json").is_file():
            raise DataError(
                f"data.dir: {directory}: not a data set (neither dataset_info.json nor *_ims.npy in it); {HOW_TO_MAKE}"
            )
        elif _read_tfds_name(self.directory) == COCO_CAPTIONS:
            self._source = CocoCaptions(self.directory, skip_undecodable)
        else:
            self._source = Prepared(self.directory, skip_undecodable)
        self.metadata = self._source.metadata

    @property
    def splits(self) -> tuple[str, ...]:
        """Returns the names of the splits."""
        return (*self._source.splits, *([HELD_OUT] if self.held_out_images else []))

    @property
    def tokenizer_json(self) -> str | None:
        """Returns the text of the `tokenizer.json` of the cached text if there is any, else of the data set; None
        without one."""
        return cached_words.cached_tokenizer_json(self.cached_text) if self.cached_text else self._source.tokenizer_json

    def split(self, name: str) -> Split:
        """Returns the split `name` (`dev` means `val`). Raises DataError that names the existing splits if it is
        missing."""
        name = SPLIT_ALIASES.get(name, name)
        if name not in self.splits:
            raise DataError(
                f"{self.directory}: no split {name!r}{suggest(name, self.splits)}; present are {', '.join(self.splits)}"
            )
        if self.held_out_images and name in ("train", HELD_OUT):
            return self._divide_train(name)
        return self._open_split(name)

    def stored_split(self, name: str) -> Split | None:
        """Returns a split as it is stored, with held-out and undecodable images and without cached text; None if there
        is none. Raises DataError if it cannot be read."""
        source = type(self._source)(self.directory)  # one that does not search for undecodable images
        return source.split(name) if name in source.splits else None

    def _open_split(self, name: str) -> Split:
        """Opens a split of the source, with its cached text. Raises DataError if no image can be used."""
        split = self._source.split(name)
        if not split.num_images:
            raise DataError(f"{self.directory}: no image of {name} can be used; make the data set again")
        if self.cached_text:
            split.cached_text = cached_words.open_cached_text(
                self.cached_text, name, split.all_captions(), self.max_tokens
            )
        return split

    def _divide_train(self, name: str) -> Split:
        """Returns train without the held-out images, or these alone. Raises DataError if no training image is left."""
        train = self._open_split("train")
        if self.held_out_images >= train.num_images:
            raise DataError(
                f"data.held_out_images={self.held_out_images}: train has only {train.num_images} images; choose a "
                "smaller number"
            )
        num_kept = train.num_images - self.held_out_images
        return train.take(name, 0, num_kept) if name == "train" else train.take(name, num_kept, train.num_images)


def _read_tfds_name(directory: Path) -> str:
    path = directory / "dataset_info.json"
    return require(read_json(path), "name", str, str(path))
