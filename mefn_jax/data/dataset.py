"""Opens a directory of data, whatever it is: prepared by this project, TFDS coco_captions, or precomputed regions."""

from pathlib import Path

from mefn_jax.config import nearest
from mefn_jax.data.coco_captions import NAME as COCO_CAPTIONS
from mefn_jax.data.coco_captions import CocoCaptions
from mefn_jax.data.files import need, read_json
from mefn_jax.data.precomputed import Precomputed
from mefn_jax.data.prepared import Prepared
from mefn_jax.data.split import Split
from mefn_jax.errors import DataError

ALIASES = {"dev": "val"}
HOW = "make one with python -m mefn_jax.data.prepare"


class Dataset:
    """A directory of data: its splits, and what is known of how its tokenizer was made (`facts`)."""

    def __init__(self, directory, skip_bad: bool = False):
        """Opens it. Raises DataError if it is missing, or none of the kinds that can be read."""
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise DataError(f"data.dir: {directory}: no such directory; {HOW}")
        if any(self.directory.glob("*_ims.npy")):
            self._kind = Precomputed(self.directory, skip_bad)
        elif not (self.directory / "dataset_info.json").is_file():
            raise DataError(
                f"data.dir: {directory}: not a data set (neither dataset_info.json nor *_ims.npy in it); {HOW}"
            )
        elif _tfds_name(self.directory) == COCO_CAPTIONS:
            self._kind = CocoCaptions(self.directory, skip_bad)
        else:
            self._kind = Prepared(self.directory, skip_bad)
        self.facts = self._kind.facts

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return self._kind.splits

    @property
    def tokenizer_json(self) -> str | None:
        """The text of the data set's `tokenizer.json`; None if it comes without one."""
        return self._kind.tokenizer_json

    def split(self, name: str) -> Split:
        """The split `name` (`dev` means `val`). Raises DataError naming those present if it is missing."""
        name = ALIASES.get(name, name)
        if name not in self.splits:
            raise DataError(
                f"{self.directory}: no split {name!r}{nearest(name, self.splits)}; present are {', '.join(self.splits)}"
            )
        split = self._kind.split(name)
        if not split.images:
            raise DataError(f"{self.directory}: no image of {name} can be used; make the data set again")
        return split


def _tfds_name(directory: Path) -> str:
    path = directory / "dataset_info.json"
    return need(read_json(path), "name", str, str(path))
