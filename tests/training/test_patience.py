"""`train.patience`: a run stops when rSum on val no longer rises, at the same step wherever it was interrupted."""

import numpy as np
import pytest
from commands import assert_equal_states, logged, read_state
from hypothesis import given
from hypothesis import strategies as st

from configs import shapes
from mefn_jax import optim
from mefn_jax.config import check_config
from mefn_jax.errors import ConfigError
from mefn_jax.training import loop
from mefn_jax.training.patience import BestRecord, restore_record

RSUMS = {2: 100.0, 4: 130.0, 6: 120.0, 8: 130.0, 10: 129.9, 12: 140.0}  # by step; not above that of step 4 three times


def make_config(**train):
    """Returns the configuration of a small model that is evaluated every second step of twenty."""
    config = shapes.get_config("smoke,model=vsepp")
    with config.unlocked():
        config.train.update({"steps": 20, "eval_every": 2, "save_every": 3, "log_every": 1, "patience": 3} | train)
    return config


@pytest.fixture
def evaluations(monkeypatch):
    """Replaces evaluations on val: their rSum is that of RSUMS, and one whose step is in `fails` fails. Returns the
    steps that were evaluated, and `fails`."""
    evaluated, fails = [], set()

    def evaluate(evaluator, params, split, completed, *_):
        if completed in fails:
            raise RuntimeError("made to fail")
        evaluated.append(completed)
        return RSUMS[completed]

    monkeypatch.setattr(loop, "evaluate_and_log", evaluate)
    return evaluated, fails


@pytest.mark.slow  # its record is restored in tests of its own
def test_run_stops_at_the_same_step_wherever_it_was_interrupted(evaluations, tmp_path, capsys):
    evaluated, fails = evaluations
    loop.train(make_config(), tmp_path / "whole")
    message = "train.patience=3: rSum of val has not risen above 130.0 (step 4) in 3 evaluations; stopped after step 10"
    printed = capsys.readouterr().out
    assert f"{message} of 20\n" in printed
    assert "done: 10 steps; best rSum of val at step 8; checkpoints" in printed  # of equal ones, the newest is kept
    assert evaluated == [2, 4, 6, 8, 10]
    # The schedule of the learning rate is that of the whole length.
    rates, train = logged(tmp_path / "whole", "learning_rate"), make_config().train
    warmup = optim.count_warmup_steps(20, train.warmup_fraction)
    expected = [float(optim.learning_rate_at(k - 1, train.learning_rate, 20, warmup)) for k in range(1, 11)]
    np.testing.assert_allclose([rates[k] for k in range(1, 11)], expected, rtol=1e-6)

    evaluated.clear()
    fails.add(8)  # stopped between the save of a step and its evaluation
    with pytest.raises(RuntimeError, match="made to fail"):
        loop.train(make_config(), tmp_path / "broken")
    fails.clear()
    loop.train(make_config(), tmp_path / "broken")
    assert f"{message} of 20\n" in capsys.readouterr().out
    assert evaluated == [2, 4, 6, 8, 10]
    assert_equal_states(read_state(tmp_path / "whole"), read_state(tmp_path / "broken"))

    # A run that has stopped stays so; with more patience it goes on.
    loop.train(make_config(steps=12), tmp_path / "broken")
    assert f"{message} of 12 already; nothing to train\n" in capsys.readouterr().out
    loop.train(make_config(steps=12, patience=4), tmp_path / "broken")
    assert evaluated == [2, 4, 6, 8, 10, 12]
    assert "done: 12 steps; best rSum of val at step 12" in capsys.readouterr().out


@given(st.lists(st.floats(0, 600), min_size=1, max_size=30), st.integers(1, 5))
def test_record_is_that_of_the_whole_history(rsums, patience):
    """Compares it with its definition over the whole list: the first maximum, and the evaluations after it."""
    record = BestRecord()
    for step, rsum in enumerate(rsums, 1):
        record = record.add(step, rsum)
    first = int(np.argmax(rsums))
    assert record == BestRecord(rsums[first], first + 1, len(rsums) - first - 1)
    assert record.is_exhausted(patience) == (len(rsums) - first - 1 >= patience)
    assert not record.is_exhausted(0)


class RecordedRsums(dict):
    """Checkpoints with the given rSum by step."""

    recorded_rsum = dict.get


def test_record_of_a_checkpoint_is_completed_by_its_evaluation():
    meta = {"best": {"rsum": 5.0, "step": 2, "since": 1}, "step": 7}
    assert restore_record(meta, RecordedRsums()) == BestRecord(5.0, 2, 1)
    assert restore_record(meta, RecordedRsums({7: 5.0})) == BestRecord(5.0, 2, 2)
    assert restore_record(meta, RecordedRsums({7: 6.0})) == BestRecord(6.0, 7, 0)
    assert restore_record({"best": None, "step": 7}, RecordedRsums()) == BestRecord()  # of an earlier format


def test_negative_patience_is_refused():
    with pytest.raises(ConfigError, match=r"train\.patience: -1 must not be negative"):
        check_config(make_config(patience=-1), {})
