"""Errors whose message alone tells a user what to do. The commands print them without a traceback."""


class UserError(Exception):
    """Error that the user can put right: in a path, an option, or a file's content."""


class ConfigError(UserError):
    """Error in an option or a configuration argument."""


class DataError(UserError):
    """Error in the data: a file is missing or malformed."""


class DamagedEntriesError(DataError):
    """Error because entries of a source cannot be used; the same command later continues with what is converted."""


class LockError(UserError):
    """Error because another process writes into the same directory."""


class CheckpointError(UserError):
    """Error of a checkpoint that cannot be written, found, or used with this configuration."""


class UnreadableCheckpointError(CheckpointError):
    """Error of a checkpoint whose files are damaged or incomplete; an earlier checkpoint may still be usable."""


class OtherProcessError(UserError):
    """Error because another process of this run failed; that process prints the cause."""


class WeightsError(UserError):
    """Error of pretrained weights that cannot be read or do not fit their configuration."""


class TrainingError(UserError):
    """Error that stops training: the loss is not finite, or the log cannot be written."""


def reason(error: Exception) -> str:
    """Returns the type of an error and the first line of its message that is not empty, at most 300 characters:
    messages of Orbax, TensorStore and Google Cloud run over many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
