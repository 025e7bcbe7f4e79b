"""Checks, before any work begins, that a command can write its files, and that no other file is lost by it.

An existing file is replaced only if a command of this project wrote it, which the caller's check `is_own` recognizes.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from etils import epath

from mefn_jax.errors import ConfigError
from mefn_jax.runtime.storage import is_remote, resolve_directory


def check_output_file(option: str, path, suffixes: tuple[str, ...], is_own: Callable[[Path], bool]) -> epath.Path:
    """Returns the path of a file that a command will write, on a disk or on gs://.

    Raises ConfigError, naming the option, if its name has none of the `suffixes` (any will do if there are none), if it
    exists and `is_own(path)` is false or raises, if it is no regular file, or if its directory cannot be written.
    """
    if suffixes and not str(path).lower().endswith(suffixes):
        raise ConfigError(f"{option}={path}: give a {' or '.join(suffixes[:2])} file")
    resolved = resolve_directory(option, path)
    if not is_remote(resolved):
        _check_replaceable(f"{option}={path}", Path(resolved), is_own)
        _check_writable(f"{option}={path}", Path(resolved).parent)
    return resolved


def check_output_directory(option: str, path, own: Mapping[str, Callable[[Path], bool]]) -> epath.Path:
    """Returns the directory, on a disk or on gs://, into which a command will write the files that `own` names.

    `own[name](path)` returns whether an existing file is of the project's kind. Raises ConfigError as
    `check_output_file` does.
    """
    directory = resolve_directory(option, path)
    if is_remote(directory):
        return directory
    local = Path(directory)
    if os.path.lexists(local) and not local.is_dir():
        raise ConfigError(f"{option}={path} is a file; give a directory")
    _check_writable(f"{option}={path}", local)
    for name, is_own in own.items():
        _check_replaceable(f"{option}={path}: {name}", local / name, is_own)
    return directory


def _check_replaceable(subject: str, path: Path, is_own: Callable[[Path], bool]) -> None:
    """Raises ConfigError if a path has anything but a file that may be replaced: an own or an empty one."""
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(f"{subject}: is a link to a file that does not exist; give another name") from None
        return
    except (OSError, ValueError) as e:  # ValueError: a zero byte
        raise ConfigError(f"{subject}: cannot be written ({getattr(e, 'strerror', None) or e})") from None
    if stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{subject}: is a directory; give a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{subject}: is a device or a pipe, not a file; give another name")
    try:
        replaceable = not status.st_size or is_own(path)
    except Exception:  # for other files, the libraries that read them raise errors of any class
        replaceable = False
    if not replaceable:
        raise ConfigError(f"{subject}: exists and was not written by this command; choose another name, or remove it")


def _check_writable(subject: str, directory: Path) -> None:
    """Raises ConfigError if files cannot be made in a directory, which may not exist yet. Leaves nothing behind."""
    try:
        existing = directory.absolute()
        while not os.path.lexists(existing):
            _stat_or_missing(existing)
            existing = existing.parent
        if not existing.is_dir():
            raise ConfigError(f"{subject}: {existing} is not a directory")
        os.rmdir(tempfile.mkdtemp(prefix=".mefn-", dir=existing))  # permissions do not show a read-only disk
    except (OSError, ValueError) as e:
        raise ConfigError(f"{subject}: cannot be written ({getattr(e, 'strerror', None) or e})") from None


def _stat_or_missing(path: Path) -> None:
    """Raises OSError for a path that does not exist and cannot be made, such as a name that is too long."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.stat()
