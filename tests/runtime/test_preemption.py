"""Signals in training and in other commands, each in a process of its own."""

import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT

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


def start(script, **options):
    """Starts a script and waits for its first line."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", script], **pipes, **options)
    assert process.stdout.readline().startswith("step")
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_first_signal_stops_after_the_step(name):
    process = start(TRAIN)
    process.send_signal(getattr(signal, name))
    process.send_signal(getattr(signal, name))  # an echo: a terminal signals a group, and a starter passes it on
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out.splitlines()[-1]) == (0, f"{name}: saved")
    assert f"{name}: saving after this step" in err


def test_second_signal_ends_at_once():
    process = start(BLOCKED)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "SIGINT: ended without a further save" in err


def test_lost_output_stops_after_the_step():
    process = start(TRAIN)
    process.stdout.close()
    assert "SIGHUP: saving after this step" in process.stderr.read()
    assert process.wait(timeout=30) == 0


def test_ignored_hangup_stays_ignored():
    process = start(TRAIN, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0].splitlines()[-1] == "SIGTERM: saved"


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_other_command_ends_in_one_line(name):
    process = start(COMMAND)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (128 + getattr(signal, name), f"error: ended by {name}\n")
