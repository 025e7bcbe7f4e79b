"""Child processes end when their parent is killed."""

import os
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT

SWEEP = """
import sys
from mefn_jax.runtime.processes import run_child
run_child([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"])
"""
WORKERS = """
import os, time
import grain
from absl import flags
from mefn_jax.data.pipeline import iterate
if __name__ == "__main__":
    flags.FLAGS([""])
    batches = iterate(grain.MapDataset.range(1000).map(lambda k: os.getpid()), 0, 1, 1, lambda pid: pid)
    print(next(batches), flush=True)
    time.sleep(60)
"""


def has_ended(pid):
    """Returns whether a process has ended, or is a zombie that nobody waits for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("script", [SWEEP, WORKERS], ids=["run of a sweep", "worker"])
def test_child_ends_with_killed_parent(script, tmp_path):
    (tmp_path / "script.py").write_text(script)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(tmp_path / "script.py")]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    child = int(parent.stdout.readline())
    assert child != parent.pid
    assert not has_ended(child)
    os.kill(child, signal.SIGINT) if script is WORKERS else None  # Ctrl-C reaches the whole group
    time.sleep(0.3)
    assert not has_ended(child)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while not has_ended(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert has_ended(child)
