"""The training loop: what is saved when an evaluation fails or a run is stopped, and faults that do not end it."""

import json
import re

import pytest

from configs import shapes
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.reports import figures
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.training import loop


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


def test_failed_evaluation_costs_no_training_and_is_made_up_for(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", fail)
        with pytest.raises(RuntimeError, match="made to fail"):
            loop.train(tiny_config("vsepp"), tmp_path)
    assert rsums(tmp_path) == {2: False}
    capsys.readouterr()
    loop.train(tiny_config("vsepp"), tmp_path)  # there is nothing to train, but to evaluate
    printed = capsys.readouterr().out
    assert "rSum" in printed
    assert "done: 2 steps; best rSum of val at step 2" in printed
    assert rsums(tmp_path) == {2: True}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val.rsum" in line] == [2]
    loop.train(tiny_config("vsepp"), tmp_path)
    assert "step 2 of 2 is done already" in capsys.readouterr().out


def test_faults_in_pictures_and_tensorboard_do_not_end_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "draw_pixels", fail)
    (tmp_path / "tensorboard").write_text("a file in the way")
    loop.train(tiny_config("mefn"), tmp_path)
    printed = capsys.readouterr().out
    assert "warning: pictures of pairs failed (RuntimeError: made to fail); training goes on" in printed
    assert len(re.findall("warning: TensorBoard failed", printed)) == 1
    assert rsums(tmp_path) == {2: True}
