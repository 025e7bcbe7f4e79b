"""Signals in training and in other commands, each in a process of its own."""

import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT, reset_signals

TRAIN = """
import itertools, time
from mefn_jax.runtime.preemption import Preemption
with Preemption() as preemption:
    for step in itertools.count(1):
        print("step", step, flush=True)
        if preemption.should_stop(step):
            break
        time.sleep(0.05)
print(f"{preemption.cause}: saved", flush=True)
"""
BLOCKED = """
import ctypes
from mefn_jax.runtime.preemption import Preemption
with Preemption():
    print("step", flush=True)
    while True:
        ctypes.CDLL(None).sleep(20)  # as a compilation, in which no handler in Python runs
"""
COMMAND = """
import time
from mefn_jax.runtime.cli import run_command
def main():
    print("step", flush=True)
    time.sleep(60)
run_command(main, lambda: None)
"""


@pytest.fixture
def start():
    """`start(script, prepare=f)` starts a script, in whose process `f` is called first, and waits for its first line;
    what still runs after the test is killed."""
    running = []

    def run(script, prepare=reset_signals):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
        process = subprocess.Popen([sys.executable, "-c", script], preexec_fn=prepare, **pipes)
        running.append(process)
        assert process.stdout.readline().startswith("step")
        return process

    yield run
    for process in running:
        process.kill()
        process.wait()


def ignore_hangup():
    """Does what nohup does."""
    reset_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_first_signal_stops_after_the_step(name, start):
    process = start(TRAIN)
    process.send_signal(getattr(signal, name))
    process.send_signal(getattr(signal, name))  # an echo: a terminal signals a group, and a starter passes it on
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out.splitlines()[-1]) == (0, f"{name}: saved")
    assert f"{name}: saving after this step" in err


def test_second_signal_ends_at_once(start):
    process = start(BLOCKED)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "SIGINT: ended without a further save" in err


def test_lost_output_stops_after_the_step(start):
    process = start(TRAIN)
    process.stdout.close()
    assert "SIGHUP: saving after this step" in process.stderr.read()
    assert process.wait(timeout=30) == 0


def test_ignored_hangup_stays_ignored(start):
    process = start(TRAIN, prepare=ignore_hangup)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0].splitlines()[-1] == "SIGTERM: saved"


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_other_command_ends_in_one_line(name, start):
    process = start(COMMAND)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (128 + getattr(signal, name), f"error: ended by {name}\n")
