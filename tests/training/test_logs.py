"""The logs of training: the line that is printed, and `metrics.jsonl`."""

import json
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from mefn_jax.errors import TrainingError
from mefn_jax.training.logs import MetricsWriter, StepLog


def test_step_log_reports_mfu(capsys):
    lines = []
    writer = SimpleNamespace(write=lambda step, values: lines.append(values))
    train = SimpleNamespace(log_every=1, batch_size=8)
    config = SimpleNamespace(train=train, data=SimpleNamespace(views=1))
    log = StepLog(config, lambda step: 0.1, 2, ideal_seconds=1e-3)
    for done in (1, 2):
        log.add(done, {"loss": 1.0, "grad_norm": 1.0}, None)
    log.write(writer, tqdm(disable=True), flush=True)
    assert lines[-1]["mfu"] == pytest.approx(1.0 / lines[-1]["ms_per_step"])  # the ideal time is 1 ms
    assert "MFU" in capsys.readouterr().out


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_metrics_writer_copies_log_to_bucket_and_appends_on_resume(gcs):
    writer = MetricsWriter("gs://bucket/runs/one", 0)
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
    writer = MetricsWriter("gs://bucket/runs/one", 2)
    writer.write(3, {"loss": 2.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in lines(gcs.text("bucket", name))] == [(1, 1), (2, 1), (3, 2)]
    gcs.before = lambda method, name: 403 if method == "GET" else None
    before = objects[name]
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: cannot be written"):
        MetricsWriter(
            "gs://bucket/runs/one", 2
        )  # a log that cannot be read now must not be replaced as if it were missing
    assert objects[name] == before
