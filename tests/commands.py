"""How the tests run the project's commands: their environment, what they print, and what they leave in a workdir."""

import json
import os
import signal
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SMOKE = "--config=configs/shapes.py:smoke"
# One size of vocabulary, so that the commands on all data sets share their compiled programs.
SMOKE_FLICKR8K = ("--config=configs/flickr8k.py:smoke", "--config.text.vocab_size=400", "--config.train.steps=2")
# Variables that pytest and libraries set in the process of the tests; no command depends on them.
IGNORED_VARIABLES = (
    "ALLOW_MULTIPLE_LIBTPU_LOAD",
    "CRC32C_SW_MODE",
    "PYTEST_CURRENT_TEST",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS",
)


def environment(cache, devices=1) -> dict:
    """Returns the environment of a command: CPU, simulated devices, and compiled programs kept in `cache`."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "MEFN_CACHE": str(cache / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(cache / f"compiled-{devices}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def is_same_environment(env: dict, other: dict) -> bool:
    """Returns whether a command sees the same in two environments."""
    first, second = ({k: v for k, v in e.items() if k not in IGNORED_VARIABLES} for e in (env, other))
    return first == second


def refusal(command, script, *args, printed="") -> str:
    """Returns the error of a command that must fail with one line and no traceback, after it printed `printed`."""
    result = command(script, *args, check=False)
    assert result.returncode in (1, 2), result.stdout + result.stderr
    assert printed in result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


def reset_signals() -> None:
    """Lets a new process receive signals, whatever this process ignores or blocks (a shell's background jobs ignore
    Ctrl-C, and training leaves an ignored signal ignored)."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def finish(processes, status=0) -> list[str]:
    """Waits for processes, each of which must end with `status`, and returns their outputs."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), outputs
    return outputs


def logged(workdir, name) -> dict[int, float]:
    """Returns the values of `name` in a run's metrics.jsonl, by step."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def read_state(workdir) -> tuple[int, dict[str, np.ndarray]]:
    """Returns the latest checkpoint's step, and all arrays of its state by their path."""
    from mefn_jax.runtime.checkpoint import Checkpoints, v1

    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest
    state = v1.load_checkpointables(workdir / "checkpoints" / str(step), {"state": None})["state"]
    arrays = {}

    def walk(path, value):
        if isinstance(value, dict):
            for key, child in value.items():
                walk(f"{path}/{key}", child)
        elif isinstance(value, list | tuple):
            for key, child in enumerate(value):
                walk(f"{path}/{key}", child)
        elif value is not None:
            arrays[path] = np.asarray(value)

    walk("", state)
    return step, arrays


def assert_equal_states(a, b) -> None:
    """Checks that two results of `read_state` are bit-identical."""
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for key, value in a[1].items():
        np.testing.assert_array_equal(value, b[1][key], err_msg=key)


def assert_same_results(first, second) -> None:
    """Checks that two folders hold evaluations that are equal in everything but their time."""
    from mefn_jax.evaluation.results import read_results

    (report, ranks), (other, other_ranks) = read_results(first), read_results(second)
    assert report.pop("seconds") > 0
    assert other.pop("seconds") > 0
    assert report == other
    assert ranks.keys() == other_ranks.keys()
    for name, array in ranks.items():
        np.testing.assert_array_equal(array, other_ranks[name], err_msg=name)
