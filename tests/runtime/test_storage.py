"""Workdirs on Google Cloud Storage: the real commands and clients, on a storage server in this process's memory."""

import io
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT, SMOKE, environment, refusal

from mefn_jax.errors import ConfigError
from mefn_jax.runtime.storage import resolve_directory

RUN = "gs://bucket/runs/one"
TRAIN = (SMOKE, "--config.train.save_every=2", "--config.train.log_every=1")


def parse_lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_run_in_bucket_resumes_after_kill_and_is_evaluated(gcs, tmp_path, command, cache):
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
    errors = process.communicate()[1].decode()
    assert killed, errors
    # Step 4 lacks only the file that makes it a checkpoint, so step 2 is the latest.
    assert "runs/one/checkpoints/4/state/manifest.ocdbt" in objects
    evaluate = ("eval.py", f"--workdir={RUN}", "--split=val")
    assert "mefn (step 2)" in command(*evaluate, "--step=latest", "--out=gs://bucket/out").stdout

    text = command(*args).stdout
    assert "resuming after 2" in text
    assert f"checkpoints in {RUN}/checkpoints" in text
    assert f"{RUN}\n" in text
    local = command("train.py", *TRAIN, f"--workdir={tmp_path}").stdout
    assert local.split("; ")[-2] in text  # the same step is best
    logged = parse_lines(gcs.text("bucket", "runs/one/metrics.jsonl"))
    expected = parse_lines((tmp_path / "metrics.jsonl").read_text())
    for key in ("loss", "val.rsum"):
        pairs = [[(line["step"], line[key]) for line in run if key in line] for run in (logged, expected)]
        assert pairs[0] == pairs[1]
    assert len(logged) == 8 + 2
    saved_steps = {name.split("/")[3] for name in objects if name.startswith("runs/one/checkpoints/")}
    assert saved_steps == {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert len([name for name in objects if name.startswith("runs/one/tensorboard/events.")]) == 2

    assert f"wrote {RUN}/eval/val/metrics.json" in command(*evaluate).stdout
    report = json.loads(gcs.text("bucket", "runs/one/eval/val/metrics.json"))
    assert report["rsum"] == pytest.approx(dict(pairs[0])[report["step"]], abs=1e-6)
    for folder in ("out", "runs/one/eval/val"):
        assert np.load(io.BytesIO(objects[f"{folder}/ranks.npz"][0]))["t2i"].shape == (120,)
    assert json.loads(gcs.text("bucket", "out/metrics.json"))["step"] == 2


def test_refused_bucket_writes_keep_checkpoints(gcs, command):
    args, log = ("train.py", *TRAIN, f"--workdir={RUN}"), []

    def refuse(method, name):  # accepts the log's first copy, at the start
        if (method, name) == ("PUT", "runs/one/metrics.jsonl"):
            log.append(name)
        return 403 if len(log) > 1 and name == "runs/one/metrics.jsonl" else None

    gcs.before = refuse
    message = refusal(command, *args)
    assert message.startswith(f"error: {RUN}/metrics.jsonl: cannot be written (OSError: Forbidden")
    assert "Checkpoints are intact" in message
    assert "runs/one/checkpoints/2/commit_success.txt" in gcs.buckets["bucket"]
    gcs.before = lambda method, name: 403 if method == "PUT" and "/checkpoints/4/" in name else None
    message = refusal(command, *args, printed="resuming after 2")
    assert f"{RUN}/checkpoints: could not save the checkpoint of step 4 (" in message
    assert "Earlier checkpoints are intact" in message


def test_resolve_directory_refuses_unusable_bucket(gcs, monkeypatch):
    with pytest.raises(ConfigError, match=r"--workdir=gs://other/run: the bucket cannot be used \(NotFound: 404"):
        resolve_directory("--workdir", "gs://other/run")
    with pytest.raises(ConfigError, match="--workdir=gs://: names no bucket"):
        resolve_directory("--workdir", "gs://")
    assert str(resolve_directory("--workdir", RUN)) == RUN
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r'--out=gs://bucket/run: gs:// needs gcsfs.* pip install -e "\.\[gs\]"'):
        resolve_directory("--out", "gs://bucket/run")


def test_resolve_directory_explains_missing_credentials(gcs, tmp_path, monkeypatch):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    with pytest.raises(ConfigError, match=r"=gs://bucket/run: no Google credentials .*gcloud auth application"):
        resolve_directory("--workdir", "gs://bucket/run")


@pytest.mark.parametrize("url", ["s3://bucket/run", "https://host/run", "file:///run"])
def test_resolve_directory_refuses_other_urls(url):
    with pytest.raises(ConfigError, match=f"--workdir={url}: only gs:// and local or mounted directories"):
        resolve_directory("--workdir", url)
