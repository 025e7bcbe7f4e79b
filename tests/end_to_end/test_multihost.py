"""Two processes on one machine are two hosts to JAX: they train as one, stop together, and say what is wrong."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, environment
from flax import traverse_util
from two_processes import ranks

from mefn_jax.data import images, pipeline
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.runtime import multihost
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.runtime.sharding import make_mesh


def test_two_processes_put_one_global_batch_together_and_find_the_same_ranks(prepared, cache, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script, out = str(ROOT / "tests" / "two_processes.py"), str(tmp_path / "found.npz")
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
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    dataset = Dataset(prepared)
    tokenizer = Tokenizer(dataset.tokenizer_json, 8, True, "keep")
    alone = pipeline.training_dataset(dataset.split("train"), tokenizer, images.Resize(16), 8, 3)
    with np.load(out) as found:
        for step in (5, 6):
            for name, expected in alone[step].items():
                np.testing.assert_array_equal(found[f"{step} {name}"], expected, err_msg=name)
        for name, expected in ranks(make_mesh(devices=jax.devices()[:1])).items():
            np.testing.assert_array_equal(found[name], expected, err_msg=name)


SMOKE = (
    "--config=configs/shapes.py:smoke",
    *(f"--config.train.{key}" for key in ("log_every=1", "eval_every=1000", "save_every=1000")),
)


@pytest.fixture(scope="module")
def start(cache):
    """`start(workdir, processes, *flags)` begins `train.py` as so many processes, of two devices each by default."""
    running = []

    def begin(workdir, processes, *given, each=lambda k: (), devices=2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        started = []
        for k in range(processes):
            joined = (f"--coordinator_address=localhost:{port}", f"--num_processes={processes}", f"--process_id={k}")
            words = [sys.executable, str(ROOT / "train.py"), *SMOKE, f"--workdir={workdir}", *given, *each(k)]
            started.append(
                subprocess.Popen(
                    words + list(joined if processes > 1 else ()),
                    env=environment(cache, devices),
                    cwd=ROOT,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        running.extend(started)
        return started

    yield begin
    for process in running:
        process.kill()


def ended(started, status=0):
    """What all processes said, once they have ended, each with this status."""
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [status] * len(started), said
    return said


def losses(workdir) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def evaluated(workdir) -> float:
    (rsum,) = [line["val.rsum"] for line in map(json.loads, (workdir / "metrics.jsonl").open()) if "val.rsum" in line]
    return rsum


def until(reached, started):
    """Waits until `reached()`, while the processes run."""
    limit = time.monotonic() + 240
    while not reached():
        assert time.monotonic() < limit
        for process in started:
            assert process.poll() is None, "ended before: " + "".join(map(str, process.communicate()))
        time.sleep(0.01)


def has_step(workdir, step):
    path = workdir / "metrics.jsonl"
    return path.is_file() and any(number >= step for number in losses(workdir))


LAST = 40  # some seconds, in which a signal is sent
STEPS = f"--config.train.steps={LAST}"


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """A run of one process."""
    workdir = tmp_path_factory.mktemp("unbroken")
    (said,) = ended(start(workdir, 1, STEPS, "--profile=2:2"))
    assert f"profile of the 2 steps after 2 in {workdir}/profile" in said
    assert list((workdir / "profile").glob("**/*.xplane.pb"))
    return workdir


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory):
    """A run of two processes of which one was told to end."""
    workdir = tmp_path_factory.mktemp("stopped")
    started = start(workdir, 2, STEPS)
    until(lambda: has_step(workdir, 4), started)
    started[1].send_signal(signal.SIGTERM)
    said = ended(started)
    (step,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert 4 < step < LAST
    assert f"told to end (SIGTERM): saved step {step}; the same command goes on from there" in said[0]
    return workdir


@pytest.mark.parametrize("processes", [1, 4])
def test_sigterm_stops_both_at_one_step_and_any_number_goes_on(processes, stopped, unbroken, start, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    (step,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    spread = ("--config.mesh.data=2", "--config.mesh.fsdp=2") if processes == 4 else ()
    said = ended(start(workdir, processes, STEPS, *spread, devices=2 if processes == 1 else 1))
    assert f"resuming after {step}" in said[0]
    found, expected = losses(workdir), losses(unbroken)
    assert found.keys() >= expected.keys()
    np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-5)
    np.testing.assert_allclose(*(evaluated(run) for run in (workdir, unbroken)), atol=1.0)  # a caption or two of 250
    with Checkpoints(workdir) as ours, Checkpoints(unbroken) as theirs:
        assert ours.latest == theirs.latest == LAST
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        saved = theirs.restore(LAST, None)["params"]
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved)
        trees = ours.restore(LAST, {"params": shapes})["params"], saved
        a, b = (traverse_util.flatten_dict(tree, sep="/") for tree in trees)
        # A softmax over keys does not see their bias: its gradient is rounding alone, which AdamW makes full steps of.
        for name in (name for name in a if not name.endswith("key/bias")):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-2, atol=1e-4, err_msg=name)


def test_a_killed_save_loses_nothing_but_itself(start, tmp_path, unbroken):
    workdir = tmp_path / "run"
    folder = workdir / "checkpoints"
    started = start(workdir, 2, STEPS, "--config.train.save_every=1")
    until(lambda: any(path.name.isdigit() for path in folder.glob("*")), started)
    until(lambda: any(".orbax-checkpoint-tmp" in path.name for path in folder.glob("*")), started)
    for process in started:
        process.kill()
    for process in started:
        process.wait()
    assert any(".orbax-checkpoint-tmp" in path.name for path in folder.iterdir())
    whole = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    (said,) = ended(start(workdir, 1, STEPS))
    assert f"resuming after {whole}" in said
    found, expected = losses(workdir), losses(unbroken)
    np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-5)


@pytest.fixture(scope="module")
def eight(start, tmp_path_factory):
    """A run of eight steps with the checkpoints 4 and 8."""
    workdir = tmp_path_factory.mktemp("eight")
    (said,) = ended(start(workdir, 1, "--config.train.steps=8", "--config.train.save_every=4", "--profile=50:2"))
    assert "warning: no profile: this run did not begin the step after 50" in said
    return workdir


@pytest.mark.parametrize(("part", "processes"), [("meta", 1), ("state", 2)])
def test_an_unreadable_newest_checkpoint_is_passed_over(part, processes, eight, start, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(eight, workdir)
    for path in (workdir / "checkpoints" / "8" / part).glob("**/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = ended(start(workdir, processes, "--config.train.steps=8", "--config.train.save_every=2"))[0]
    assert "checkpoints/8: cannot be read as a checkpoint" in said
    assert f"moved what cannot be read to {workdir}/unreadable" in said
    assert "resuming after 4" in said
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest == 8
        assert checkpoints.meta(8)["step"] == 8
    assert (workdir / "unreadable" / "8").is_dir()
    assert set(losses(workdir)) == set(range(1, 9))


def test_the_only_checkpoint_is_not_thrown_away(eight, start, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(eight, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    for path in (workdir / "checkpoints" / "8" / "meta").glob("**/*"):
        if path.is_file():
            path.write_bytes(b"{")
    (said,) = ended(start(workdir, 1, "--config.train.steps=9"), status=1)
    assert "there is no other that can be read: remove it to begin anew" in said
    assert (workdir / "checkpoints" / "8").is_dir()


def test_a_workdir_that_is_not_shared_is_refused(start, tmp_path):
    said = ended(start(tmp_path / "run", 2, each=lambda k: (f"--workdir={tmp_path / str(k)}",)), status=1)
    assert f"--workdir={tmp_path}/1 on process 1 is not the directory of process 0" in said[1]
    assert "process 1 cannot go on" in said[0]
    assert list((tmp_path / "0").iterdir()) == []


def test_data_that_one_host_lacks_stops_all(start, tmp_path):
    where = ("", f"--config.data.dir={tmp_path}/nothing")
    started = start(tmp_path / "run", 2, each=lambda k: filter(None, [where[k]]))
    said = ended(started, status=1)
    assert "error: process 1 cannot go on; its output says why" in said[0]
    assert "nothing" in said[1]


def test_a_missing_host_is_an_error_that_says_so(start, tmp_path):
    waiting = start(tmp_path / "run", 2, "--join_timeout=3")
    waiting[1].kill()
    said, _ = waiting[0].communicate(timeout=60)
    assert waiting[0].returncode == 1
    assert "error: the other processes did not come within 3 s. Run the same command on all hosts" in said


def test_hosts_that_run_something_else_are_refused(start, tmp_path):
    started = start(tmp_path / "run", 2, each=lambda k: (f"--config.train.learning_rate=1e-{3 + k}",))
    said = ended(started, status=1)
    assert "process 1 does not run the same as process 0" in said[0]
    assert "process 1 differs from process 0 (train.learning_rate: 0.0001 here, 0.001 there)" in said[1]


def test_where_several_processes_are_expected(monkeypatch):
    for name in ("SLURM_PROCID", "MEGASCALE_NUM_SLICES", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert (multihost.count_slurm_tasks(), multihost.count_tpu_hosts()) == (1, 1)  # in a job, but not by srun
    monkeypatch.setenv("SLURM_PROCID", "0")
    for tasks, one in (("1(x4)", True), ("1", True), ("1(x2),2", False), ("8(x2)", False), ("11", False)):
        monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
        assert multihost.has_one_task_per_node() == one, tasks
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c")
    assert (multihost.count_slurm_tasks(), multihost.count_tpu_hosts()) == (4, 3)
