"""Access to a directory in TFDS's format: its builder, and its examples by position. Errors name what is damaged."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import tensorflow_datasets as tfds

from mefn_jax.data import images
from mefn_jax.errors import DataError, reason


@contextlib.contextmanager
def _damage_errors(subject):
    """Raises DataError, naming `subject` as damaged, for any error in the body but a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as e:  # TFDS, protobuf and Riegeli raise errors of many classes
        raise DataError(f"{subject}: damaged ({reason(e)}); make the data set again") from e


def open_builder(directory: Path) -> tuple:
    """Returns TFDS's builder of a directory, and its metadata, a dict. Raises DataError if they cannot be read."""
    with _damage_errors(directory):
        builder = tfds.builder_from_directory(str(directory))
        return builder, dict(builder.info.metadata or {})


class TfdsRecords:
    """Records of splits, in the form that `Split` needs.

    `splits` is TFDS's expression, such as "train" or "train+restval". `convert(example, where)` makes a record of an
    example, whose image is the bytes as stored; `where` is a text that names its place, for errors.
    """

    def __init__(self, builder, splits: str, convert: Callable[[dict, str], dict]):
        """Opens the files. Raises DataError if they cannot be read."""
        self._where, self._convert = f"{builder.data_path} {splits}", convert
        with _damage_errors(self._where):
            self._source = builder.as_data_source(splits, decoders={"image": tfds.decode.SkipDecoding()})
            self._length = len(self._source)

    def __len__(self):
        return self._length

    def __getitem__(self, row: int) -> dict:
        """Returns a record. Raises DataError if it cannot be read."""
        with _damage_errors(f"{self._where}: record {row}"):
            return self._convert(self._source[row], self._where)


def find_undecodable(records: TfdsRecords) -> dict[int, str]:
    """Returns the images that cannot be decoded, as a dict from position to name; decodes all of them."""
    undecodable = {}
    for k in range(len(records)):
        record = records[k]
        try:
            images.decode(record["image"], images.Resize(32), record["image_id"], may_reduce=True)
        except DataError:
            undecodable[k] = record["image_id"]
    return undecodable
