"""Storage for a run: a disk, or Google Cloud Storage (`gs://bucket/path`).

An object in a bucket is written in one piece, is never appended to, and becomes visible when it is complete.
"""

import importlib
import logging
import os
import tempfile
import time
from pathlib import Path

from etils import epath

from mefn_jax.errors import ConfigError, reason

SAVE_SECONDS = 10.0  # between two saves of a long job's progress
LOGIN = "log in with `gcloud auth application-default login`"


def is_remote(path) -> bool:
    """Returns whether a path is a URL rather than a path on this machine."""
    return "://" in str(path)


def resolve_directory(option: str, path) -> epath.Path:
    """Returns the directory that an option names, on a disk or on gs://. Raises ConfigError, naming the option, for any
    other URL and for a bucket that cannot be used (gcsfs, credentials or rights are missing)."""
    if is_remote(path) and not str(path).startswith("gs://"):
        raise ConfigError(f"{option}={path}: only gs:// and local or mounted directories can be used")
    directory = epath.Path(path).expanduser()  # epath reads /gs/x as gs://x
    if is_remote(directory):
        _check_bucket(f"{option}={path}", str(directory).removeprefix("gs://").split("/")[0])
    return directory


def cache_directory() -> Path:
    """Returns the cache directory of the project, `$MEFN_CACHE` or `~/.cache/mefn_jax`. Raises RuntimeError if there is
    no home directory, as in some containers."""
    return Path(os.environ.get("MEFN_CACHE") or Path.home() / ".cache" / "mefn_jax").expanduser()


def expand_home(path: str) -> str:
    """Returns a path with `~` and `~user` at its beginning replaced by the home directory. Raises ConfigError if there
    is no such user: the path would become a directory named `~...`."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"{path}: there is no home directory of this user; write ./{path} for a file of this name")
    return expanded


def absolute(path) -> epath.Path:
    """Returns an absolute path, which stays valid when the working directory changes."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).resolve()


def write_atomic(path: epath.Path, data: bytes) -> None:
    """Writes a file so that no reader ever sees a part of it. Raises OSError."""
    if is_remote(path):
        _write_object(path, data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    os.replace(temporary, path)


class Mirror:
    """A local directory, `local`, in which files grow. For a remote `workdir` it is a temporary directory that is
    copied there, otherwise the workdir itself."""

    def __init__(self, workdir):
        self._remote = epath.Path(workdir) if is_remote(workdir) else None
        self._temporary = tempfile.TemporaryDirectory(prefix="mefn-") if self._remote else None
        self.local = Path(self._temporary.name if self._temporary else workdir)
        self._copied, self._last_copy = {}, time.monotonic()

    def fetch(self, name: str) -> None:
        """Copies the file `name` from a remote workdir to `local`, if it exists there. Raises OSError."""
        if self._remote:
            try:
                data = (self._remote / name).read_bytes()
            except FileNotFoundError:  # not `exists`, which answers no during an outage
                return
            except Exception as e:
                raise OSError(reason(e)) from e
            (self.local / name).write_bytes(data)

    def due(self, seconds: float) -> bool:
        """Returns whether the workdir is remote and the last copy at least `seconds` old."""
        return self._remote is not None and time.monotonic() - self._last_copy >= seconds

    def copy(self) -> None:
        """Copies the changed files to a remote workdir. Raises OSError."""
        if not self._remote:
            return
        for path in self.local.rglob("*"):
            name, status = str(path.relative_to(self.local)), path.stat()
            state = (status.st_size, status.st_mtime_ns)
            if path.is_file() and self._copied.get(name) != state:
                _write_object(self._remote / name, path.read_bytes())
                self._copied[name] = state
        self._last_copy = time.monotonic()

    def close(self) -> None:
        """Removes the temporary directory."""
        if self._temporary:
            self._temporary.cleanup()


def _write_object(path: epath.Path, data: bytes) -> None:
    """Writes an object to a bucket. Raises OSError."""
    try:
        path.write_bytes(data)
    except Exception as e:  # gcsfs, aiohttp, requests and google.auth raise errors of their own
        raise OSError(reason(e)) from e


def _check_bucket(option: str, bucket: str) -> None:
    """Raises ConfigError, naming the option, if a bucket cannot be used. Asks for the bucket itself, as Orbax will:
    epath would report a failure as a missing file."""
    try:
        importlib.import_module("gcsfs")
        from google.api_core import exceptions
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
    except ImportError as e:
        raise ConfigError(f'{option}: gs:// needs gcsfs ({e}); pip install -e ".[gs]"') from None
    # These libraries log a failure that also arrives as an exception, which is reported once.
    for library in ("gcsfs", "google.auth", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if not bucket:
        raise ConfigError(f"{option}: names no bucket; write gs://BUCKET/PATH")
    try:
        client = storage.Client()
    except GoogleAuthError as e:
        raise ConfigError(f"{option}: no Google credentials ({reason(e)}); {LOGIN}") from e
    except OSError as e:
        raise ConfigError(f"{option}: {reason(e)} Set GOOGLE_CLOUD_PROJECT") from e
    try:
        client.get_bucket(bucket, timeout=20, retry=None)
    except (GoogleAuthError, exceptions.Unauthorized) as e:
        raise ConfigError(f"{option}: Google rejects these credentials ({reason(e)}); {LOGIN}") from e
    except Exception as e:  # errors of the network, of the bucket, or of its rights
        raise ConfigError(f"{option}: the bucket cannot be used ({reason(e)})") from e
