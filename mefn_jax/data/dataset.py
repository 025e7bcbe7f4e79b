"""Opens a directory of data, whatever it is: prepared by this project, TFDS coco_captions, or precomputed regions."""

from pathlib import Path

from mefn_jax.config import suggest
from mefn_jax.data.formats import cached_words
from mefn_jax.data.formats.coco_captions import COCO_CAPTIONS, CocoCaptions
from mefn_jax.data.formats.precomputed import Precomputed
from mefn_jax.data.formats.prepared import Prepared
from mefn_jax.data.parsing import read_json, require
from mefn_jax.data.split import SPLIT_ALIASES, Split
from mefn_jax.errors import DataError

HELD_OUT = "held_out"  # images of train that choices are made on
HOW_TO_MAKE = "make one with python -m mefn_jax.data.prepare"


class Dataset:
    """A directory of data: its splits, and what is known of how its tokenizer was made (`facts`)."""

    def __init__(
        self,
        directory,
        skip_undecodable: bool = False,
        held_out_images: int = 0,
        cached_text: str = "",
        max_tokens: int = 0,
    ):
        """Opens it. The last `held_out_images` images of train are the split `held_out` instead; `cached_text` is a directory of
        cached words (`cached_words.py`), of which `max_tokens` a caption are read. Raises DataError if the data is
        missing, or none of the kinds that can be read."""
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
        elif _tfds_name(self.directory) == COCO_CAPTIONS:
            self._source = CocoCaptions(self.directory, skip_undecodable)
        else:
            self._source = Prepared(self.directory, skip_undecodable)
        self.metadata = self._source.metadata

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return (*self._source.splits, *([HELD_OUT] if self.held_out_images else []))

    @property
    def tokenizer_json(self) -> str | None:
        """The text of the data set's `tokenizer.json`, or of its cached words'; None if it comes without one."""
        return cached_words.cached_tokenizer_json(self.cached_text) if self.cached_text else self._source.tokenizer_json

    def split(self, name: str) -> Split:
        """The split `name` (`dev` means `val`). Raises DataError naming those present if it is missing."""
        name = SPLIT_ALIASES.get(name, name)
        if name not in self.splits:
            raise DataError(
                f"{self.directory}: no split {name!r}{suggest(name, self.splits)}; present are {', '.join(self.splits)}"
            )
        if self.held_out_images and name in ("train", HELD_OUT):
            return self._part_of_train(name)
        return self._whole(name)

    def _whole(self, name: str) -> Split:
        split = self._source.split(name)
        if not split.num_images:
            raise DataError(f"{self.directory}: no image of {name} can be used; make the data set again")
        if self.cached_text:
            split.cached_text = cached_words.open_cached_text(
                self.cached_text, name, split.all_captions(), self.max_tokens
            )
        return split

    def _part_of_train(self, name: str) -> Split:
        whole = self._whole("train")
        if self.held_out_images >= whole.num_images:
            raise DataError(
                f"data.held_out_images={self.held_out_images}: train has {whole.num_images} images, and some must be left"
            )
        cut = whole.num_images - self.held_out_images
        return whole.take(name, 0, cut) if name == "train" else whole.take(name, cut, whole.num_images)


def _tfds_name(directory: Path) -> str:
    path = directory / "dataset_info.json"
    return require(read_json(path), "name", str, str(path))
