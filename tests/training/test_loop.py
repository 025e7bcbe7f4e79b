"""The training loop: what is saved when an evaluation fails or a run is stopped, and faults that do not end it."""

import re
import shutil

import numpy as np
import pytest
from commands import logged
from fake_trackers import read_runs, write_packages

from configs import shapes
from mefn_jax.config import count_pairs
from mefn_jax.errors import CheckpointError, LockError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.reports import figures
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.runtime.lock import hold_lock
from mefn_jax.training import loop
from mefn_jax.training.logs import StepLog
from mefn_jax.training.position import Position


def tiny_config(model="mefn", **train):
    """Returns the smoke configuration of a model with the given options of training."""
    config = shapes.get_config(f"smoke,model={model}")
    with config.unlocked():
        config.train.steps = config.train.eval_every = 2
        config.eval.batch_size = 4
        config.eval.explained_pairs = 2
        config.train.update(train)
    return config


def rsums(workdir):
    """Returns whether the rSum of each checkpoint is recorded."""
    with Checkpoints(workdir) as checkpoints:
        steps = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
        return {step: checkpoints.is_evaluated(step) for step in sorted(steps)}


def fail(*_args, **_kwargs):
    raise RuntimeError("made to fail")


@pytest.fixture
def unevaluated(runs, tmp_path):
    """Copies of the runs that were stopped between the save of their last step and its evaluation."""
    for name, run in runs.items():
        shutil.copytree(run, tmp_path / name)
        (tmp_path / name / "checkpoints" / "2" / "rsum.json").unlink()
        shutil.rmtree(tmp_path / name / "tensorboard")
    return tmp_path


def test_missing_evaluation_is_made_up_for(unevaluated, capsys):
    workdir = unevaluated / "vsepp"
    assert rsums(workdir) == {2: False}
    loop.train(tiny_config("vsepp"), workdir)  # there is nothing to train, but to evaluate
    printed = capsys.readouterr().out
    assert "rSum" in printed
    assert "done: 2 steps; best rSum of val at step 2" in printed
    assert rsums(workdir) == {2: True}
    loop.train(tiny_config("vsepp"), workdir)
    assert "step 2 of 2 is done already" in capsys.readouterr().out


def test_faults_in_pictures_tensorboard_and_trackers_do_not_end_training(unevaluated, monkeypatch, capsys):
    monkeypatch.setattr(figures, "draw_pixels", fail)
    write_packages(unevaluated / "packages")
    monkeypatch.syspath_prepend(str(unevaluated / "packages"))
    monkeypatch.setenv("FAKE_TRACKERS", str(unevaluated))
    monkeypatch.setenv("FAKE_TRACKERS_FAIL", "log")
    config = tiny_config("mefn")
    config.log.to = "wandb"
    workdir = unevaluated / "mefn"
    (workdir / "tensorboard").write_text("a file in the way")
    loop.train(config, workdir)
    printed = capsys.readouterr().out
    assert printed.count("warning: wandb failed (ConnectionError: log: no route to host); training goes on") == 1
    assert [run.ends for run in read_runs(unevaluated, "wandb").values()] == [[False]]
    assert "warning: pictures of pairs failed (RuntimeError: made to fail); training goes on" in printed
    assert len(re.findall("warning: TensorBoard failed", printed)) == 1
    assert rsums(workdir) == {2: True}


def test_resume_with_another_batch_size_visits_every_pair_once(tmp_path, monkeypatch, capsys):
    """A quarter of an epoch in batches of 16, then the rest of it in batches of 40."""
    seen, add = [], StepLog.add

    def record(log, completed, metrics, captions):
        seen.append((completed, captions))
        return add(log, completed, metrics, captions)

    monkeypatch.setattr(StepLog, "add", record)
    options = {"steps": 0, "eval_every": 100, "log_every": 1, "warmup_fraction": 0.5}
    with monkeypatch.context() as patch:  # a failed evaluation costs nothing that was trained
        patch.setattr(Evaluator, "evaluate", fail)
        with pytest.raises(RuntimeError, match="made to fail"):
            loop.train(tiny_config("vsepp", epochs=0.25, **options), tmp_path)
    assert rsums(tmp_path)[5] is False
    loop.train(tiny_config("vsepp", epochs=1.0, batch_size=40, **options), tmp_path)
    assert "11 (1.0 epochs), resuming after 5" in capsys.readouterr().out
    assert [(completed, len(captions)) for completed, captions in seen] == [
        *((k, 16) for k in range(1, 6)),
        *((k, 40) for k in range(6, 12)),
    ]
    np.testing.assert_array_equal(np.sort(np.concatenate([captions for _, captions in seen])), np.arange(320))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.meta(11)["examples"] == 320
    # Step 6 begins after a quarter of the examples, halfway up to the peak, which is reached after half of them.
    rates, peak = logged(tmp_path, "learning_rate"), tiny_config().train.learning_rate
    assert [rates[6], rates[8]] == pytest.approx([0.5 * peak, peak])
    assert rates[11] < 0.2 * peak


def test_position_of_unchanged_batch_size_is_that_of_its_steps():
    config = tiny_config(steps=0, epochs=3.7)
    whole, pairs = Position().count_steps(config, 320), count_pairs(config)
    for step in range(whole + 1):
        position = Position().after(step, pairs)
        assert position.data_offset(pairs) == 0
        assert position.count_steps(config, 320) == whole == 74
        assert position.schedule(config, 320) == (whole, 0.0)


@pytest.mark.parametrize("name", ["triplet", "siglip"])
def test_resume_with_another_loss_is_refused_by_name(name, mefn_run):
    config = tiny_config()
    config.loss.name = name
    with pytest.raises(CheckpointError, match=f"loss.name: 'info_nce' there, '{name}' here"):
        loop.train(config, mefn_run)


def test_second_training_in_a_workdir_is_refused(tmp_path):
    with hold_lock("--workdir", tmp_path), pytest.raises(LockError, match=r"another process .* writes here"):
        loop.train(tiny_config(), tmp_path)


def test_renamed_checkpoint_stops_training(mefn_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(mefn_run, workdir)
    (workdir / "checkpoints" / "2").rename(workdir / "checkpoints" / "3")
    with pytest.raises(CheckpointError, match="checkpoints/3: is the checkpoint of step 2; give it its name back"):
        loop.train(tiny_config(), workdir)
    assert (workdir / "checkpoints" / "3").is_dir()
