"""Two processes on one machine are two hosts to JAX: they see one global batch, and one tokenizer."""

import socket
import subprocess
import sys

import numpy as np
from conftest import ROOT, environment

from mefn_jax.data import images, pipeline
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.tokenizer import Tokenizer


def test_two_processes_put_one_global_batch_together(prepared, cache, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script, out = str(ROOT / "tests" / "two_processes.py"), str(tmp_path / "found.npz")
    env = environment(cache, devices=2) | {"PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, script, str(prepared), port, str(index), out],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    dataset = Dataset(prepared)
    tokenizer = Tokenizer(dataset.tokenizer_json, 8, True, "keep")
    alone = pipeline.training_dataset(dataset.split("train"), tokenizer, images.Resize(16), 8, 3)
    with np.load(out) as found:
        for step in (5, 6):
            for name, expected in alone[step].items():
                np.testing.assert_array_equal(found[f"{step} {name}"], expected, err_msg=name)
