"""Errors whose message alone tells a user what to do; the commands print them without a traceback."""


class UserError(Exception):
    """Something the user can put right: a path, an option, a file's content."""


class ConfigError(UserError):
    """A wrong option or configuration argument."""


class DataError(UserError):
    """A file of the data that is missing or malformed."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, found, or used with this configuration."""


class UnreadableCheckpointError(CheckpointError):
    """A checkpoint whose files are damaged or incomplete; one before it may be used."""


class OtherProcessError(UserError):
    """Another process of this run could not go on, and says why."""


class WeightsError(UserError):
    """Pretrained weights that cannot be read or do not fit their configuration."""


class TrainingError(UserError):
    """Training cannot go on: the loss is not finite, or the log cannot be written."""


def reason(error: Exception) -> str:
    """The kind of an error and its first informative line; those of Orbax, TensorStore and Google run over many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
