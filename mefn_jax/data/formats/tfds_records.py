"""A directory in TFDS's format: its builder and its examples by position. What is damaged is named."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import tensorflow_datasets as tfds

from mefn_jax.data import images
from mefn_jax.errors import DataError, reason


@contextlib.contextmanager
def _damage_errors(what):
    try:
        yield
    except Exception as e:  # TFDS, protobuf and Riegeli have many kinds
        raise DataError(f"{what}: damaged ({reason(e)}); make the data set again") from e


def open_builder(directory: Path) -> tuple:
    """The builder of a directory, and its metadata, a dict. Raises DataError if they cannot be read."""
    with _damage_errors(directory):
        builder = tfds.builder_from_directory(str(directory))
        return builder, dict(builder.info.metadata or {})


class TfdsRecords:
    """The examples of splits, `"train"` or `"train+restval"`, as `Split` wants them: `convert(example, where)` makes a
    record of an example, whose image is the bytes that are stored, and `where` it stands."""

    def __init__(self, builder, splits: str, convert: Callable[[dict, str], dict]):
        """Opens the files. Raises DataError if they cannot be read."""
        self._where, self._convert = f"{builder.data_path} {splits}", convert
        with _damage_errors(self._where):
            self._source = builder.as_data_source(splits, decoders={"image": tfds.decode.SkipDecoding()})
            self._length = len(self._source)

    def __len__(self):
        return self._length

    def __getitem__(self, row: int) -> dict:
        """A record. Raises DataError if it cannot be read."""
        with _damage_errors(f"{self._where}: record {row}"):
            example = self._source[row]
        return self._convert(example, self._where)


def find_undecodable(records: TfdsRecords) -> dict[int, str]:
    """Position and name of the images that cannot be decoded; decodes every one."""
    bad = {}
    for k in range(len(records)):
        record = records[k]
        try:
            images.decode(record["image"], images.Resize(32), record["image_id"])
        except DataError:
            bad[k] = record["image_id"]
    return bad
