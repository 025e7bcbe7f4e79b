"""Opens the images and captions that a model is evaluated on."""

from typing import NamedTuple

from mefn_jax.data.dataset import Dataset
from mefn_jax.data.digests import digest_data, find_changes
from mefn_jax.data.from_config import fill_data_widths, open_dataset
from mefn_jax.data.mixed_dataset import MixedDataset
from mefn_jax.data.mixture import MixedSplit
from mefn_jax.data.split import Split
from mefn_jax.errors import DataError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.evaluation.run import Gallery
from mefn_jax.runtime.console import print0


class OpenedGallery(NamedTuple):
    """An opened gallery: its data set and its split.

    `is_own` is False if the data set is, or may be, another than the one that the model was trained on.
    """

    dataset: Dataset
    split: Split
    is_own: bool


def open_split(evaluator: Evaluator, gallery: Gallery) -> OpenedGallery:
    """Opens the data set of a gallery (the configured one if `data_dir` is empty), and its split.

    Prints a note if `data_dir` is not what the model was trained on. Raises DataError if the configured data set has
    changed since, and ConfigError if the model cannot take the split.
    """
    config = evaluator.config
    if gallery.data_dir:
        config.data.dir = gallery.data_dir
    dataset = open_dataset(config)
    split = dataset.split(gallery.split)
    if isinstance(dataset, MixedDataset) and not isinstance(split, MixedSplit):
        print0(f"note: {gallery.split} is that of {dataset.directory}, the first data set of the mixture")
    fill_data_widths(config, split)
    own_digests = evaluator.data or {}
    digests = digest_data(dataset) if own_digests else {}
    changes = find_changes(own_digests, digests) if own_digests else []
    if changes and not gallery.data_dir:
        raise DataError(
            f"data.dir={dataset.directory}: {' and '.join(changes)} have changed since the run was trained; restore "
            f"the data set, or give --data_dir={dataset.directory} to evaluate on other data than the run's"
        )
    if changes:
        print0(f"note: --data_dir={gallery.data_dir} is not the data that the run was trained on")
    is_known = digests.get("train") is not None and not changes
    return OpenedGallery(dataset, split, not gallery.data_dir or (is_known and own_digests.get("train") is not None))
