"""Mixture of data sets in the form of a `Dataset`: training data of all, other splits of the first."""

from fractions import Fraction
from pathlib import Path

from mefn_jax.data.dataset import Dataset
from mefn_jax.data.mixture import MixedSplit, mix_splits
from mefn_jax.data.split import Split


class MixedDataset:
    """Data sets that are mixed for training; attributes and methods are those of `Dataset`.

    `val`, `test`, held-out images and other splits are those of the first data set, which `directory` names. The
    tokenizer is theirs if all have the same; otherwise there is none, and training makes one from the captions of all.
    """

    cached_text = ""

    def __init__(self, mixture: list[tuple[str, Fraction]], skip_undecodable: bool = False, held_out_images: int = 0):
        """Opens the directories of a mixture (`mixture.parse_mixture`). Raises DataError as `Dataset` does."""
        self.names, self.shares = [name for name, _ in mixture], [share for _, share in mixture]
        held_out = [held_out_images] + [0] * (len(mixture) - 1)
        self._datasets = [Dataset(name, skip_undecodable, n) for name, n in zip(self.names, held_out, strict=True)]
        first = self._datasets[0]
        self.directory, self.splits, self.held_out_images = Path(first.directory), first.splits, held_out_images
        # The normalization of a text that a data set was prepared with concerns its tokenizer alone.
        self.metadata = first.metadata if self.tokenizer_json is not None else {}

    @property
    def tokenizer_json(self) -> str | None:
        """Returns the text of the data sets' `tokenizer.json` if all have the same; else None."""
        texts = {dataset.tokenizer_json for dataset in self._datasets}
        return texts.pop() if len(texts) == 1 else None

    def split(self, name: str) -> Split:
        """Returns the split `name`: the mixture for "train", else that of the first data set. Raises DataError and
        ConfigError as `Dataset.split` and `mix_splits` do."""
        return (
            self._mix([d.split("train") for d in self._datasets]) if name == "train" else self._datasets[0].split(name)
        )

    def stored_split(self, name: str) -> Split | None:
        """Returns a split as it is stored, as `Dataset.stored_split` does."""
        splits = [dataset.stored_split(name) for dataset in self._datasets[: None if name == "train" else 1]]
        return None if None in splits else self._mix(splits) if name == "train" else splits[0]

    def _mix(self, splits: list[Split]) -> MixedSplit:
        return mix_splits(splits, self.shares, self.names)
