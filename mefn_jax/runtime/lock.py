"""Locks of directories that one command at a time may write: a run, an index, features; and of the runs of a sweep.

On a disk a lock is a flock on DIR/.lock, which the kernel passes on to the server of a shared disk and which ends with
its process, however that ends. Where there are no such locks, in a bucket and on some network disks, it is a lease: the
file is written anew all the time, and a lease that is not renewed for `LEASE_SECONDS` is taken over.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from etils import epath

from mefn_jax.errors import ConfigError, LockError, reason
from mefn_jax.runtime.storage import is_remote, write_atomic

LOCK_FILE = ".lock"
LEASE_SECONDS = 90.0
RENEWAL_SECONDS = 20.0
POLL_SECONDS = 2.0  # between two looks at another's lease
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def hold_lock(option: str, directory, name: str = LOCK_FILE):
    """Holds the lock of a directory, which is created if it does not exist. Yields `check()`, which raises LockError if
    a lease was lost. `name` is the file of the lock: a directory may have locks for several purposes.

    Raises LockError, naming the process that holds it, if the lock is held by another, after waiting for the end of
    a lease that is not renewed; ConfigError, naming the option, if the directory cannot be written.
    """
    if is_remote(directory):
        with _hold_lease(option, directory, _BucketFile(str(epath.Path(directory) / name))) as check:
            yield check
        return
    directory = Path(directory)
    created = [path for path in (directory, *directory.parents) if not os.path.lexists(path)]
    if not created and not directory.is_dir():
        raise ConfigError(f"{option}={directory} is a file; give a directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = take_flock(directory / name)
    except OSError as e:
        if e.errno not in NO_LOCKS or not os.path.isdir(directory):
            raise ConfigError(f"{option}={directory}: cannot be written ({e.strerror}); choose another") from e
        file = None
    except LockError as e:
        raise LockError(f"{option}={directory}: {e}") from None
    try:
        if file:
            with file:
                try:
                    yield lambda: None
                finally:  # while it is held, so that no other process has the file meanwhile
                    (directory / name).unlink(missing_ok=True)
        else:
            with _hold_lease(option, directory, _DiskFile(directory / name)) as check:
                yield check
    finally:
        with contextlib.suppress(OSError):  # one is not empty
            for path in created:
                path.rmdir()


def take_flock(path: Path):
    """Locks a file, which is created if it does not exist, and returns it open; closing it ends the lock. Raises
    LockError if another process holds it, OSError if it cannot be written or the disk has no locks."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            with file:
                if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    file.seek(0)
                    raise LockError(_describe_holder(file.read())) from None
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its last holder removed it meanwhile
    with contextlib.suppress(OSError):  # a full disk; the lock does not depend on it
        file.truncate(0)
        file.write(json.dumps(_describe_self()))
        file.flush()
    return file


def _describe_self() -> dict:
    """Returns what identifies this process: its host and number, and where /proc has it, the boot, the container and
    the moment of its start."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "process": _identify_process(os.getpid())}


def _identify_process(pid: int) -> str | None:
    """Returns a text that no other process ever has; None if there is no such process, or no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        container = os.stat("/proc/self/ns/pid").st_ino
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
    return f"{boot} {container} {pid} {start}"


def _has_ended(holder: dict) -> bool:
    """Returns whether a holder is known to have ended: it ran in this boot and container, and does not any more."""
    ours, theirs = _identify_process(os.getpid()), holder.get("process")
    if not ours or not isinstance(theirs, str) or theirs.split()[:2] != ours.split()[:2]:
        return False
    return _identify_process(holder["pid"]) != theirs


def _parse_holder(text: str) -> dict:
    """Returns the content of a lock file; an empty dict if it is damaged."""
    try:
        holder = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) and type(holder.get("pid")) is int else {}


def _describe_holder(text: str) -> str:
    """Returns the message that another process holds a lock, from the content of its file."""
    holder = _parse_holder(text)
    who = f" (process {holder['pid']} on {holder.get('host')})" if holder else ""
    return f"another process{who} writes here; wait for it, end it, or choose another directory"


@dataclasses.dataclass
class _DiskFile:
    """The file of a lease on a disk without locks."""

    path: Path

    def read(self) -> tuple[str, object]:
        """Returns the content, and what `write` needs to replace it; two empty texts if there is no file."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return "", ""
        return text, text

    def write(self, text: str, version):
        """Replaces the content of a version by another, and returns the new version. Raises FileExistsError if it has
        another one."""
        if self.read()[1] != version:
            raise FileExistsError(self.path)
        if self.path.exists():  # which is empty, if `take_flock` made it before it failed
            write_atomic(epath.Path(self.path), text.encode())
        else:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(text)
        return text

    def remove(self, version) -> None:
        """Removes the file if it has this version."""
        if self.read()[1] == version:
            self.path.unlink()


class _BucketFile:
    """The file of a lease in a bucket; its versions are the generations of the object. Methods as in `_DiskFile`."""

    def __init__(self, url: str):
        from google.cloud import storage  # an optional dependency, which `resolve_directory` checks

        bucket, _, name = url.removeprefix("gs://").partition("/")
        self._blob = storage.Client().bucket(bucket).blob(name)

    def read(self) -> tuple[str, object]:
        from google.api_core import exceptions

        try:
            return self._blob.download_as_bytes().decode(errors="replace"), self._blob.generation
        except exceptions.NotFound:
            return "", 0

    def write(self, text: str, version):
        from google.api_core import exceptions

        try:
            self._blob.upload_from_string(text, if_generation_match=version)
        except exceptions.PreconditionFailed as e:
            raise FileExistsError(self._blob.name) from e
        return self._blob.generation

    def remove(self, version) -> None:
        self._blob.delete(if_generation_match=version)


@contextlib.contextmanager
def _hold_lease(option: str, directory, file):
    """Holds the lease that `file` is, as `hold_lock` does."""
    me = _describe_self()
    try:
        version = _take_lease(option, directory, file, me)
    except LockError:
        raise
    except Exception as e:  # clients of buckets raise errors of their own
        raise ConfigError(f"{option}={directory}: cannot be written ({reason(e)}); choose another") from e
    lease = _Lease(file, me, version)
    renewing = threading.Thread(target=lease.renew, daemon=True)
    renewing.start()

    def check():
        if lease.lost:
            raise LockError(f"{option}={directory}: another process writes here since the lease of this one ended")

    try:
        yield check
    finally:
        lease.ended.set()
        renewing.join()
        with contextlib.suppress(Exception):  # an outage: the lease ends by itself
            if not lease.lost:
                file.remove(lease.version)


def _take_lease(option: str, directory, file, me: dict):
    """Takes a lease and returns its version, as soon as there is none or the one there is was not renewed for
    `LEASE_SECONDS`. Raises LockError if it is renewed, or taken by another."""
    text, version = file.read()
    deadline, waits = time.monotonic() + LEASE_SECONDS, False
    # A holder is alive if its file changes. Times in the file would not do, because the clocks of hosts differ.
    while text and not _has_ended(_parse_holder(text)) and time.monotonic() < deadline:
        if not waits:
            print(
                f"{option}={directory}: waiting up to {LEASE_SECONDS:.0f} s to see whether the process that wrote here "
                "still runs",
                flush=True,
            )
            waits = True
        time.sleep(POLL_SECONDS)
        seen, now = file.read()
        if now != version and seen:
            raise LockError(f"{option}={directory}: {_describe_holder(seen)}")
        text, version = seen, now
    try:
        return file.write(_lease_text(me), version)
    except FileExistsError:
        raise LockError(f"{option}={directory}: {_describe_holder(file.read()[0])}") from None


def _lease_text(me: dict) -> str:
    """Returns the content of a lease, never twice the same."""
    return json.dumps(me | {"lease": uuid.uuid4().hex})


@dataclasses.dataclass
class _Lease:
    """A lease that is held.

    Attributes:
        file, me: its file, and the description of this process.
        version: the version of the file that this process wrote.
        lost: whether another process has taken the lease.
        ended: set when it is not to be renewed any more.
    """

    file: object
    me: dict
    version: object
    lost: bool = False
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    def renew(self) -> None:
        """Renews the lease until it has ended or is lost."""
        while not self.lost and not self.ended.wait(RENEWAL_SECONDS):
            try:
                self.version = self.file.write(_lease_text(self.me), self.version)
            except FileExistsError:
                with contextlib.suppress(Exception):  # an outage: the next renewal asks again
                    self.lost = self._is_taken()
            except Exception:  # an outage, in which nobody else can write either
                continue

    def _is_taken(self) -> bool:
        """Returns whether another process wrote the file. After an upload whose answer was lost, it is our own."""
        text, version = self.file.read()
        if _parse_holder(text) | {"lease": ""} == self.me | {"lease": ""}:
            self.version = version
            return False
        return True
