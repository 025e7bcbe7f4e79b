"""Workdirs on Google Cloud Storage: the real commands and clients, on a storage of this process's memory."""

import io
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, environment
from fake_gcs import FakeGcs

from mefn_jax.errors import ConfigError, TrainingError
from mefn_jax.runtime.storage import resolve_directory
from mefn_jax.training.logs import MetricsWriter

RUN = "gs://bucket/runs/one"
TRAIN = ("--config=configs/shapes.py:smoke", "--config.train.save_every=2", "--config.train.log_every=1")


@pytest.fixture
def gcs(monkeypatch):
    """A storage with one bucket, which this process's clients and the commands' take for Google's."""
    with FakeGcs("bucket") as fake:
        for name, value in fake.environment().items():
            monkeypatch.setenv(name, value)
        yield fake
        assert not fake.unknown


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_is_killed_in_a_save_resumed_and_evaluated(gcs, tmp_path, command, cache):
    objects, args = gcs.buckets["bucket"], ("train.py", *TRAIN, f"--workdir={RUN}")
    killed = []

    def kill(method, name):
        if (method, name) == ("PUT", "runs/one/checkpoints/4/commit_success.txt") and not killed:
            killed.append(name)
            process.send_signal(signal.SIGKILL)
            return 503
        return None

    gcs.before = kill
    process = subprocess.Popen(
        [sys.executable, *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, env=environment(cache)
    )
    said = process.communicate()[1].decode()
    assert killed, said
    # All of step 4 is there but what makes it a checkpoint, so that step 2 is the latest.
    assert "runs/one/checkpoints/4/state/manifest.ocdbt" in objects
    evaluate = ("eval.py", f"--workdir={RUN}", "--split=val")
    assert "mefn (step 2)" in command(*evaluate, "--step=latest", "--out=gs://bucket/out").stdout

    text = command(*args).stdout
    assert "resuming after 2" in text
    assert f"checkpoints in {RUN}/checkpoints" in text
    assert f"{RUN}\n" in text
    local = command("train.py", *TRAIN, f"--workdir={tmp_path}").stdout
    assert local.split("; ")[-2] in text  # the same step is best
    logged = lines(gcs.text("bucket", "runs/one/metrics.jsonl"))
    expected = lines((tmp_path / "metrics.jsonl").read_text())
    for key in ("loss", "val.rsum"):
        pairs = [[(line["step"], line[key]) for line in run if key in line] for run in (logged, expected)]
        assert pairs[0] == pairs[1]
    assert len(logged) == 8 + 2
    kept = {name.split("/")[3] for name in objects if name.startswith("runs/one/checkpoints/")}
    assert kept == {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert len([name for name in objects if name.startswith("runs/one/tensorboard/events.")]) == 2

    assert f"wrote {RUN}/eval/val/metrics.json" in command(*evaluate).stdout
    report = json.loads(gcs.text("bucket", "runs/one/eval/val/metrics.json"))
    assert report["rsum"] == pytest.approx(dict(pairs[0])[report["step"]], abs=1e-6)
    for folder in ("out", "runs/one/eval/val"):
        assert np.load(io.BytesIO(objects[f"{folder}/ranks.npz"][0]))["t2i"].shape == (120,)
    assert json.loads(gcs.text("bucket", "out/metrics.json"))["step"] == 2


def test_refused_writes_are_said_in_one_line_and_lose_no_checkpoint(gcs, command):
    args, log = ("train.py", *TRAIN, f"--workdir={RUN}"), []

    def refuse(method, name):  # the log's first copy, at the start, is taken
        if (method, name) == ("PUT", "runs/one/metrics.jsonl"):
            log.append(name)
        return 403 if len(log) > 1 and name == "runs/one/metrics.jsonl" else None

    gcs.before = refuse
    message = refusal(command, *args)
    assert message.startswith(f"error: {RUN}/metrics.jsonl: cannot be written (OSError: Forbidden")
    assert "Checkpoints are intact" in message
    assert "runs/one/checkpoints/2/commit_success.txt" in gcs.buckets["bucket"]
    gcs.before = lambda method, name: 403 if method == "PUT" and "/checkpoints/4/" in name else None
    message = refusal(command, *args, ran="resuming after 2")
    assert f"{RUN}/checkpoints: could not save the checkpoint of step 4 (" in message
    assert "Earlier checkpoints are intact" in message


def refusal(command, *args, ran=""):
    """The one line of a command that must fail after printing `ran`."""
    result = command(*args, check=False)
    assert result.returncode == 1
    assert ran in result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


def test_the_log_is_copied_when_due_and_goes_on_where_it_was(gcs):
    writer = MetricsWriter(RUN, 0)
    objects, name = gcs.buckets["bucket"], "runs/one/metrics.jsonl"
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0})
    writer.flush(30.0)
    assert lines(gcs.text("bucket", name)) == []
    writer.flush()
    assert [line["step"] for line in lines(gcs.text("bucket", name))] == [1, 2, 3]
    writer.write(4, {"loss": 1.0})
    writer.close()
    assert [line["step"] for line in lines(gcs.text("bucket", name))] == [1, 2, 3, 4]
    writer = MetricsWriter(RUN, 2)
    writer.write(3, {"loss": 2.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in lines(gcs.text("bucket", name))] == [(1, 1), (2, 1), (3, 2)]
    gcs.before = lambda method, name: 403 if method == "GET" else None
    before = objects[name]
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: cannot be written"):
        MetricsWriter(RUN, 2)  # what cannot be read now must not be taken for missing, and replaced
    assert objects[name] == before


def test_a_bucket_that_is_not_there_or_not_ours_is_refused(gcs, monkeypatch):
    with pytest.raises(ConfigError, match=r"--workdir=gs://other/run: the bucket cannot be used \(NotFound: 404"):
        resolve_directory("--workdir", "gs://other/run")
    with pytest.raises(ConfigError, match="--workdir=gs://: names no bucket"):
        resolve_directory("--workdir", "gs://")
    assert str(resolve_directory("--workdir", RUN)) == RUN
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r'--out=gs://bucket/run: gs:// needs gcsfs.* pip install -e "\.\[gs\]"'):
        resolve_directory("--out", "gs://bucket/run")


def test_without_credentials_it_says_how_to_log_in(gcs, tmp_path, monkeypatch):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    with pytest.raises(ConfigError, match=r"=gs://bucket/run: no Google credentials .*gcloud auth application"):
        resolve_directory("--workdir", "gs://bucket/run")


@pytest.mark.parametrize("url", ["s3://bucket/run", "https://host/run", "file:///run"])
def test_other_urls_are_refused_by_name(url):
    with pytest.raises(ConfigError, match=f"--workdir={url}: only gs:// and local or mounted directories"):
        resolve_directory("--workdir", url)
