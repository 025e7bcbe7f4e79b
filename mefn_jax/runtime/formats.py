"""Numbers the layouts of what is written to disk, so that later versions read it: checkpoints, indexes, evaluations."""

import dataclasses
from collections.abc import Callable, Mapping

from mefn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Format:
    """The layout of one kind of file, which the key `format` of its metadata names.

    Whoever changes the layout increases `number` and adds an upgrade. Files from before formats were numbered count as
    format 0.

    Attributes:
        number: the format that is written.
        error: raised for a file that cannot be read.
        remedy: what to do with a file that is too old: the end of the message.
        upgrades: `upgrades[k](metadata)` returns the metadata of format k in format k + 1. An option that is new gets
            the value that the code had before the option.
    """

    number: int
    error: type[UserError]
    remedy: str
    upgrades: Mapping[int, Callable[[dict], dict]] = dataclasses.field(default_factory=dict)

    def upgrade(self, metadata: dict, path) -> dict:
        """Returns metadata in the format that is written, through the upgrades one after the other. `path` is for the
        message.

        Raises `error` for a format that is newer, or older than the upgrades, naming the version that wrote it, and
        for metadata that has no number of a format.
        """
        number = metadata.get("format", 0) if isinstance(metadata, dict) else None
        if type(number) is not int or number < 0:
            raise self.error(f"{path}: expected an object whose 'format' is a number, found {str(metadata)[:60]!r}")
        version = f"version (commit {metadata['commit']})" if "commit" in metadata else "version"
        if number > self.number:
            raise self.error(
                f"{path}: has format {number}, written by a newer {version}; this version reads up to format "
                f"{self.number}: update it"
            )
        for older in range(number, self.number):
            if older not in self.upgrades:
                raise self.error(
                    f"{path}: was written by an earlier {version} (format {older}), which this one cannot read; "
                    f"{self.remedy}"
                )
            metadata = self.upgrades[older](metadata) | {"format": older + 1}
        return metadata
