"""Trackers beside TensorBoard, on stand-ins of their packages: the same run after a resume, steps without folds, and
faults that cost a warning and no training."""

import contextlib
import json
import signal
import sys
import time

import jax
import pytest
from commands import SMOKE, finish, logged, refusal
from fake_trackers import read_runs, write_packages

from configs import shapes
from mefn_jax.errors import ConfigError
from mefn_jax.training import trackers
from mefn_jax.training.logs import MetricsWriter
from mefn_jax.training.tracker_clients import TRACKERS
from mefn_jax.training.trackers import check_trackers


def config_of(to, project="scenes"):
    """Returns a configuration with these trackers."""
    config = shapes.get_config("smoke")
    config.log.update(to=to, project=project)
    return config


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder in which the stand-ins keep their runs; they are importable."""
    write_packages(tmp_path / "packages")
    (tmp_path / "store").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("FAKE_TRACKERS", str(tmp_path / "store"))
    monkeypatch.setattr(trackers, "BATCH_SECONDS", 0.01)
    yield tmp_path / "store"
    for name in TRACKERS:
        sys.modules.pop(name, None)


def write_lines(workdir, config, first, last, *, close=True, evaluated=()):
    """Writes the lines of steps as the training loop does, from a checkpoint at `first`; returns the writer."""
    writer = MetricsWriter(workdir, first, config)
    for step in range(first + 1, last + 1):
        writer.write(step, {"loss": 1 / step, "ms_per_step": 2})
        if step in evaluated:
            writer.write(step, {"val.rsum": 10.0 * step})
    if close:
        writer.close()
    return writer


def wait_until(is_true, seconds=20.0):
    """Waits for what a thread does; fails after some seconds."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_resumed_run_goes_on_in_the_same_run_without_repeating_steps(tracker, store, tmp_path):
    """A process ends without closing anything after step 7; the next one resumes from the checkpoint at step 4, whose
    evaluation is missing."""
    workdir = tmp_path / "runs" / "one"
    workdir.mkdir(parents=True)
    config = config_of(tracker)
    killed = write_lines(workdir, config, 0, 7, close=False, evaluated=[2])
    wait_until(lambda: [run.steps("loss")[-1] for run in read_runs(store, tracker).values() if run.points] == [7])
    (feed,) = killed._feeds
    feed._client.finish = lambda failed: None  # it must not reach the stand-in: the process is dead
    ((before, _),) = read_runs(store, tracker).items()
    write_lines(workdir, config, 4, 10, evaluated=[5, 8])
    ((after, run),) = read_runs(store, tracker).items()
    assert before == after == json.loads((workdir / "trackers.json").read_text())[tracker]["id"]
    assert run.steps("loss") == list(range(1, 11))
    assert run.points["loss"] == [(step, 1 / step) for step in range(1, 11)]
    assert run.points["val.rsum"] == [(2, 20.0), (5, 50.0), (8, 80.0)]  # 5 comes after the loss of step 7
    assert len(run.begins) == 2
    assert run.begins[0]["project"] == "scenes"
    assert run.begins[0]["name"] == (after if tracker == "trackio" else "runs/one")
    assert run.ends == [False]
    options = run.begins[0]["config"] or run.params
    assert options.get("train.seed") == "0" or options["train"]["seed"] == 0
    feed._closing.set()


def test_all_trackers_at_once_keep_their_own_runs(store, tmp_path):
    write_lines(tmp_path, config_of("wandb, mlflow,trackio"), 0, 3)
    record = json.loads((tmp_path / "trackers.json").read_text())
    for tracker in TRACKERS:
        ((run_id, run),) = read_runs(store, tracker).items()
        assert record[tracker] == {"id": run_id, "steps": {"loss": 3, "ms_per_step": 3}}
        assert run.steps("loss") == [1, 2, 3]


@pytest.mark.parametrize("method", ["init", "log", "finish"])
@pytest.mark.parametrize("tracker", TRACKERS)
def test_client_that_raises_costs_one_warning(tracker, method, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_TRACKERS_FAIL", method)
    monkeypatch.setattr(trackers, "RETRY_SECONDS", 0.0)
    writer = write_lines(tmp_path, config_of(tracker), 0, 5, close=False)
    time.sleep(0.1)
    writer.write(6, {"loss": 0.5})
    writer.close()
    printed = capsys.readouterr().out
    cause = f"warning: {tracker} failed (ConnectionError: {method}: no route to host); training goes on"
    assert printed.count("warning") == printed.count(cause) == 1
    assert (f"note: {tracker} did not get 6 of 6 lines" in printed) == (method != "finish")
    assert list(logged(tmp_path, "loss")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("tracker", TRACKERS)
def test_outage_at_the_beginning_loses_nothing(tracker, store, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_TRACKERS_FAIL", "init")
    monkeypatch.setattr(trackers, "RETRY_SECONDS", 0.02)
    writer = write_lines(tmp_path, config_of(tracker), 0, 3, close=False)
    wait_until(lambda: writer._feeds[0]._warned)
    monkeypatch.delenv("FAKE_TRACKERS_FAIL")
    wait_until(lambda: writer._feeds[0]._client is not None)
    writer.close()
    (run,) = read_runs(store, tracker).values()
    assert run.steps("loss") == [1, 2, 3]


def test_client_that_hangs_neither_slows_nor_holds_a_training(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_TRACKERS_HANG", "log")
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "QUEUE_LINES", 50)
    writer = write_lines(tmp_path, config_of("wandb"), 0, 1, close=False)
    wait_until(lambda: writer._feeds[0]._client is not None and not writer._feeds[0]._queue.qsize())
    start = time.monotonic()
    for step in range(2, 102):
        writer.write(step, {"loss": 1.0})
    assert writer._feeds[0]._queue.qsize() == 50
    writer.close()
    assert time.monotonic() - start < 5
    printed = capsys.readouterr().out
    assert printed.count("warning") == 1
    assert "warning: wandb failed (50 lines wait for it); training goes on" in printed
    assert "note: wandb did not get 100 of 101 lines" in printed


def test_failed_training_is_shown_as_failed(store, tmp_path):
    writer = write_lines(tmp_path, config_of("wandb,mlflow"), 0, 1, close=False)
    with contextlib.suppress(RuntimeError), contextlib.closing(writer):
        raise RuntimeError("made to fail")
    assert [run.ends for name in ("wandb", "mlflow") for run in read_runs(store, name).values()] == [[True], [True]]


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("wandbb", "log.to: 'wandbb' is not one of wandb, mlflow, trackio, did you mean 'wandb'?"),
        ("wandb", "log.to=wandb: the package wandb is missing; pip install wandb"),
        ("mlflow,mlflow", "names one twice"),
    ],
)
def test_check_trackers_names_what_is_wrong(to, message, tmp_path, monkeypatch, request):
    if "twice" in message:
        request.getfixturevalue("store")
    (tmp_path / "wandb").mkdir()  # as W&B leaves it where it runs; it is no package
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        check_trackers(config_of(to))
    assert message in str(caught.value)


def test_missing_package_stops_a_training_before_any_work(tmp_path, command):
    message = refusal(command, "train.py", SMOKE, "--config.log.to=trackio", f"--workdir={tmp_path / 'run'}")
    assert "pip install trackio" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"wandb": 3}', '{"wandb": {"id": 3, "steps": {}}}', '{"wandb": {}}']
)
def test_damaged_record_is_refused_by_name(content, store, tmp_path):
    (tmp_path / "trackers.json").write_text(content)
    with pytest.raises(ConfigError, match=r"trackers\.json: damaged \(.*\); remove it"):
        MetricsWriter(tmp_path, 0, config_of("wandb"))


def test_other_processes_than_the_first_have_no_tracker(store, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_lines(tmp_path, config_of("wandb"), 0, 3)
    assert not list(store.iterdir())
    assert "wandb" not in sys.modules
    assert not (tmp_path / "trackers.json").exists()


def test_record_is_kept_in_a_bucket(gcs, store):
    for first, last in ((0, 3), (1, 5)):
        write_lines("gs://bucket/runs/one", config_of("wandb"), first, last)
    ((run_id, run),) = read_runs(store, "wandb").items()
    assert json.loads(gcs.text("bucket", "runs/one/trackers.json"))["wandb"]["id"] == run_id
    assert run.steps("loss") == [1, 2, 3, 4, 5]


@pytest.mark.slow  # the parts are tested above; this is a training in processes of its own
def test_killed_and_terminated_training_goes_on_in_the_same_runs(store, tmp_path, start_training, monkeypatch):
    """SIGKILL, then SIGTERM, then to the end: one run in each tracker, every step once, and the end is shown."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    workdir = tmp_path / "run"
    options = (f"--config.log.to={','.join(TRACKERS)}", "--config.train.steps=60000", "--config.train.save_every=20")
    for number in (signal.SIGKILL, signal.SIGTERM):
        (process,) = start_training(workdir, 1, *options, model="vsepp", devices=1)
        before = {name: dict(read_runs(store, name)) for name in TRACKERS}
        deadline = time.monotonic() + 200
        for line in process.stdout:
            runs = [run for name in TRACKERS for run in read_runs(store, name).values()]
            old = max([run.steps("loss")[-1] for n in TRACKERS for run in before[n].values() if run.points], default=0)
            if len(runs) == 3 and all(run.points and run.steps("loss")[-1] > old + 60 for run in runs):
                break
            assert time.monotonic() < deadline, line
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0), output
    last = max(logged(workdir, "loss"))
    finish(start_training(workdir, 1, *options, f"--config.train.steps={last + 40}", model="vsepp", devices=1))
    for name in TRACKERS:
        ((_, run),) = read_runs(store, name).items()
        steps = run.steps("loss")
        assert len(run.begins) == 3, name
        assert run.ends == [False, False]
        assert steps == sorted(set(steps)), name
        assert steps[-1] == last + 40
        assert set(range(1, last + 41)) - set(steps) <= set(range(60, last + 1)), "only a kill leaves a gap"
