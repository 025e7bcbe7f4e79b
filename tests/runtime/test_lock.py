"""Locks of directories: one process at a time, none left behind by a kill, and leases where there are no locks."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from commands import ROOT

from mefn_jax import precompute
from mefn_jax.errors import ConfigError, LockError
from mefn_jax.retrieval import index
from mefn_jax.runtime import lock

HOLD = """
import sys, time
from mefn_jax.runtime.lock import hold_lock
with hold_lock("--out", sys.argv[1]):
    print("holding", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path / "run"`."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.communicate()


def test_lock_of_living_process_refuses_and_of_killed_one_does_not(holder, tmp_path):
    message = rf"--out={tmp_path}/run: another process \(process {holder.pid} on .*\) writes here"
    with pytest.raises(LockError, match=message), lock.hold_lock("--out", tmp_path / "run"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock.hold_lock("--out", tmp_path / "run"):
        assert json.loads((tmp_path / "run" / lock.LOCK_FILE).read_text())["pid"] == os.getpid()
        with pytest.raises(LockError), lock.hold_lock("--out", tmp_path / "run"):
            pass
    assert list((tmp_path / "run").iterdir()) == []


def test_lock_leaves_no_directory_that_it_created_and_names_option(tmp_path):
    with lock.hold_lock("--out", tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300), "/proc/x"):
        with pytest.raises(ConfigError, match=f"--out={path}"), lock.hold_lock("--out", path):
            pass


@pytest.mark.parametrize(
    "write",
    [
        lambda out: index.build_index(None, None, {}, out, out),
        lambda out: precompute.precompute(None, out, []),
    ],
    ids=["index", "precompute"],
)
def test_commands_that_write_a_directory_hold_its_lock(write, tmp_path):
    with lock.hold_lock("--out", tmp_path), pytest.raises(LockError, match=f"--out={tmp_path}: another process"):
        write(tmp_path)


@pytest.fixture
def quick(monkeypatch):
    """Leases of half a second."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.02)


@pytest.fixture(params=["bucket", "disk without locks"])
def place(request, tmp_path, monkeypatch):
    """A directory whose locks are leases, and a function that writes its lock file."""
    if request.param == "bucket":
        gcs = request.getfixturevalue("gcs")

        def write(text):
            gcs.buckets["bucket"]["run/.lock"] = (text.encode(), next(gcs.generations))

        return "gs://bucket/run", write

    def refuse(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    (tmp_path / "run").mkdir()
    return tmp_path / "run", (tmp_path / "run" / lock.LOCK_FILE).write_text


def test_lease_is_renewed_refuses_others_and_ends(place, quick):
    directory, _ = place
    with lock.hold_lock("--workdir", directory) as check:
        message = f"--workdir={directory}: another process .* writes here"
        with pytest.raises(LockError, match=message), lock.hold_lock("--workdir", directory):
            pass
        check()
    with lock.hold_lock("--workdir", directory):  # at once
        pass


@pytest.mark.parametrize("text", ['{"host": "elsewhere", "pid": 7}', "damaged", "[1]", "["])
def test_lease_that_is_not_renewed_is_taken_over_after_a_wait(text, place, quick, capsys):
    directory, write = place
    write(text)
    with lock.hold_lock("--workdir", directory) as check:
        check()
    assert "waiting up to" in capsys.readouterr().out


def test_lease_of_ended_process_of_this_machine_is_taken_over_at_once(place, quick, holder, capsys):
    directory, write = place
    describe = {"host": "here", "pid": holder.pid, "process": lock._identify_process(holder.pid)}
    holder.kill()
    holder.wait()
    write(json.dumps(describe))
    with lock.hold_lock("--workdir", directory):
        pass
    assert "waiting" not in capsys.readouterr().out


def test_lost_lease_stops_its_holder(place, quick):
    directory, write = place
    lost = threading.Event()
    with lock.hold_lock("--workdir", directory) as check:
        write('{"host": "elsewhere", "pid": 7}')
        for _ in range(100):
            try:
                check()
            except LockError:
                lost.set()
                break
            lost.wait(0.02)
    assert lost.is_set()
