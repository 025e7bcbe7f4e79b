"""Two processes on one machine are two hosts to JAX: they train as one, stop together, and name what is wrong."""

import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from commands import ROOT, environment, finish, logged
from flax import traverse_util
from two_processes import ranks

from mefn_jax.data import images, pipeline
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.runtime import multihost
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.runtime.sharding import make_mesh


def test_two_processes_read_one_batch_and_find_equal_ranks(prepared, cache, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script, out = str(ROOT / "tests" / "two_processes.py"), str(tmp_path / "out.npz")
    env = environment(cache, devices=2) | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"}
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
    finish(started)
    dataset = Dataset(prepared)
    tokenizer = Tokenizer(dataset.tokenizer_json, 8, True, "keep")
    batches = pipeline.training_dataset(dataset.split("train"), tokenizer, images.Resize(16), 8, 3)
    with np.load(out) as arrays:
        for step in (5, 6):
            for name, expected in batches[step].items():
                np.testing.assert_array_equal(arrays[f"{step} {name}"], expected, err_msg=name)
        for name, expected in ranks(make_mesh(devices=jax.devices()[:1])).items():
            np.testing.assert_array_equal(arrays[name], expected, err_msg=name)


def logged_rsum(workdir) -> float:
    (rsum,) = logged(workdir, "val.rsum").values()
    return rsum


def wait_until(reached, started):
    """Waits until `reached()`, while all processes run."""
    deadline = time.monotonic() + 240
    while not reached():
        assert time.monotonic() < deadline
        for process in started:
            assert process.poll() is None, "ended too early: " + "".join(map(str, process.communicate()))
        time.sleep(0.01)


def has_step(workdir, step):
    path = workdir / "metrics.jsonl"
    return path.is_file() and any(number >= step for number in logged(workdir, "loss"))


LAST = 40  # takes some seconds, in which a signal can be sent
STEPS = f"--config.train.steps={LAST}"


@pytest.fixture(scope="module")
def unbroken(start_training, tmp_path_factory):
    """The workdir of a finished run of one process."""
    workdir = tmp_path_factory.mktemp("unbroken")
    (output,) = finish(start_training(workdir, 1, STEPS, "--profile=2:2"))
    assert f"profile of the 2 steps after 2 in {workdir}/profile" in output
    assert list((workdir / "profile").glob("**/*.xplane.pb"))
    return workdir


@pytest.fixture(scope="module")
def stopped(start_training, tmp_path_factory):
    """The workdir of a run of two processes after one of them received SIGINT, which it passes on as SIGTERM."""
    workdir = tmp_path_factory.mktemp("stopped")
    started = start_training(workdir, 2, STEPS)
    wait_until(lambda: has_step(workdir, 4), started)
    started[1].send_signal(signal.SIGINT)
    outputs = finish(started)
    (step,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert 4 < step < LAST
    assert f"SIGTERM: saved step {step}; run the same command to resume" in outputs[0]
    return workdir


# The test below resumes a run of two processes as one, too.
@pytest.mark.parametrize(
    ("processes", "mesh"),
    [(2, ""), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, ""), (2, "1x2"), (4, "2x2")))],
)
def test_sigterm_saves_one_step_and_any_number_of_processes_resumes(
    processes, mesh, stopped, unbroken, start_training, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    (step,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    flags = [f"--config.mesh.{axis}={n}" for axis, n in zip(("data", "fsdp"), mesh.split("x"), strict=False) if mesh]
    outputs = finish(start_training(workdir, processes, STEPS, *flags, devices=1 if mesh else 2))
    assert f"resuming after {step}" in outputs[0]
    values, expected = logged(workdir, "loss"), logged(unbroken, "loss")
    assert values.keys() >= expected.keys()
    np.testing.assert_allclose([values[k] for k in expected], list(expected.values()), rtol=1e-5)
    # One or two of 250 captions may differ.
    np.testing.assert_allclose(logged_rsum(workdir), logged_rsum(unbroken), atol=1.0)
    with Checkpoints(workdir) as resumed, Checkpoints(unbroken) as whole:
        assert resumed.latest == whole.latest == LAST
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        saved = whole.restore(LAST, None)["params"]
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved)
        trees = resumed.restore(LAST, {"params": shapes})["params"], saved
        a, b = (traverse_util.flatten_dict(tree, sep="/") for tree in trees)
        # A softmax over keys ignores their bias: its gradient is rounding error, which AdamW turns into full steps.
        for name in (name for name in a if not name.endswith("key/bias")):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-2, atol=1e-4, err_msg=name)


def test_killed_save_keeps_earlier_checkpoints(start_training, tmp_path, unbroken):
    workdir = tmp_path / "run"
    folder = workdir / "checkpoints"
    started = start_training(workdir, 2, STEPS, "--config.train.save_every=1")
    wait_until(lambda: any(path.name.isdigit() for path in folder.glob("*")), started)
    wait_until(lambda: any(".orbax-checkpoint-tmp" in path.name for path in folder.glob("*")), started)
    for process in started:
        process.kill()
    for process in started:
        process.wait()
    assert any(".orbax-checkpoint-tmp" in path.name for path in folder.iterdir())
    newest = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    (output,) = finish(start_training(workdir, 1, STEPS))
    assert f"resuming after {newest}" in output
    values, expected = logged(workdir, "loss"), logged(unbroken, "loss")
    np.testing.assert_allclose([values[k] for k in expected], list(expected.values()), rtol=1e-5)


def test_multihost_refuses_workdir_that_is_not_shared(start_training, tmp_path):
    outputs = finish(start_training(tmp_path / "run", 2, each=lambda k: (f"--workdir={tmp_path / str(k)}",)), status=1)
    assert f"--workdir={tmp_path}/1 on process 1 is not the directory of process 0" in outputs[1]
    assert "process 1 cannot go on" in outputs[0]
    assert not (tmp_path / "0").exists()


def test_multihost_stops_all_processes_if_one_lacks_data(start_training, tmp_path):
    data = ("", f"--config.data.dir={tmp_path}/nothing")
    started = start_training(tmp_path / "run", 2, each=lambda k: filter(None, [data[k]]))
    outputs = finish(started, status=1)
    assert "error: process 1 cannot go on; its output says why" in outputs[0]
    assert "nothing" in outputs[1]


def test_multihost_names_missing_process(start_training, tmp_path):
    waiting = start_training(tmp_path / "run", 2, "--join_timeout=3")
    waiting[1].kill()
    output, _ = waiting[0].communicate(timeout=60)
    assert waiting[0].returncode == 1
    assert "error: timed out after 3 s waiting for the other processes. Run the same command on all hosts" in output


def test_multihost_refuses_processes_with_other_options(start_training, tmp_path):
    started = start_training(tmp_path / "run", 2, each=lambda k: (f"--config.train.learning_rate=1e-{3 + k}",))
    outputs = finish(started, status=1)
    assert "process 1 does not run the same as process 0" in outputs[0]
    assert "process 1 differs from process 0 (train.learning_rate: 0.0001 here, 0.001 there)" in outputs[1]


def test_slurm_and_tpu_environment_variables_count_processes(monkeypatch):
    for name in ("SLURM_PROCID", "MEGASCALE_NUM_SLICES", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert (multihost.count_slurm_tasks(), multihost.count_tpu_hosts()) == (1, 1)  # in a job, but not started by srun
    monkeypatch.setenv("SLURM_PROCID", "0")
    for tasks, one in (("1(x4)", True), ("1", True), ("1(x2),2", False), ("8(x2)", False), ("11", False)):
        monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
        assert multihost.has_one_task_per_node() == one, tasks
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c")
    assert (multihost.count_slurm_tasks(), multihost.count_tpu_hosts()) == (4, 3)
