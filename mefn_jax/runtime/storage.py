"""Directories on Google Cloud Storage (`gs://bucket/path`), where a run may be kept instead of on a disk.

An object is written at once and never appended to, and appears when it is complete.
"""

import importlib
import logging
import os
import tempfile
import time
from pathlib import Path

from etils import epath

from mefn_jax.errors import ConfigError, reason

SAVE_SECONDS = 10.0  # between two notes of how far a long job has come
LOGIN = "log in with `gcloud auth application-default login`"


def is_remote(path) -> bool:
    """Whether it is a URL rather than a path of this machine's."""
    return "://" in str(path)


def resolve_directory(option: str, path) -> epath.Path:
    """The directory that an option names, on a disk or on gs://. Raises ConfigError, naming the option, for another
    URL, and for a bucket that cannot be used: without gcsfs, credentials or rights."""
    if is_remote(path) and not str(path).startswith("gs://"):
        raise ConfigError(f"{option}={path}: only gs:// and local or mounted directories can be used")
    found = epath.Path(path)  # which takes /gs/x for gs://x
    if is_remote(found):
        _check_bucket(f"{option}={path}", str(found).removeprefix("gs://").split("/")[0])
    return found


def absolute(path) -> epath.Path:
    """The path, whatever the working directory becomes."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).resolve()


def write_atomic(path: epath.Path, data: bytes) -> None:
    """Writes a file of which a reader never sees half. Raises OSError."""
    if is_remote(path):
        _write_object(path, data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    os.replace(new, path)


class Mirror:
    """The local directory `local` where files grow; of a remote `workdir` a temporary one that is copied there, else
    the workdir itself."""

    def __init__(self, workdir):
        self._remote = epath.Path(workdir) if is_remote(workdir) else None
        self._temporary = tempfile.TemporaryDirectory(prefix="mefn-") if self._remote else None
        self.local = Path(self._temporary.name if self._temporary else workdir)
        self._copied, self._last = {}, time.monotonic()

    def fetch(self, name: str) -> None:
        """Makes `local / name` what the workdir has of that name, if it has any. Raises OSError."""
        if self._remote:
            try:
                data = (self._remote / name).read_bytes()
            except FileNotFoundError:  # asked in this way, since an outage would answer `exists` with no
                return
            except Exception as e:
                raise OSError(reason(e)) from e
            (self.local / name).write_bytes(data)

    def due(self, seconds: float) -> bool:
        """Whether there is a copy to make, and the last is at least `seconds` old."""
        return self._remote is not None and time.monotonic() - self._last >= seconds

    def copy(self) -> None:
        """Copies the files that have changed. Raises OSError."""
        if not self._remote:
            return
        for path in self.local.rglob("*"):
            name, found = str(path.relative_to(self.local)), path.stat()
            state = (found.st_size, found.st_mtime_ns)
            if path.is_file() and self._copied.get(name) != state:
                _write_object(self._remote / name, path.read_bytes())
                self._copied[name] = state
        self._last = time.monotonic()

    def close(self) -> None:
        """Removes what is temporary."""
        if self._temporary:
            self._temporary.cleanup()


def _write_object(path: epath.Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except Exception as e:  # gcsfs, aiohttp, requests and google.auth each have their own
        raise OSError(reason(e)) from e


def _check_bucket(option: str, bucket: str) -> None:
    """Asks for the bucket, as Orbax will; epath would take a failure for a file that is not there."""
    try:
        importlib.import_module("gcsfs")
        from google.api_core import exceptions
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
    except ImportError as e:
        raise ConfigError(f'{option}: gs:// needs gcsfs ({e}); pip install -e ".[gs]"') from None
    # What these log of a failure reaches us as an exception as well, which is reported once.
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
        raise ConfigError(f"{option}: Google does not take these credentials ({reason(e)}); {LOGIN}") from e
    except Exception as e:  # the network's, and the bucket's or its rights'
        raise ConfigError(f"{option}: the bucket cannot be used ({reason(e)})") from e
