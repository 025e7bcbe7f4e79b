"""Checkpoints: a full disk, an unreadable newest checkpoint, an unreadable only one, and other formats."""

import dataclasses
import re
import resource
import shutil
import subprocess
import sys

import pytest
from commands import ROOT, SMOKE, assert_equal_states, environment, finish, logged, read_state

from mefn_jax.errors import CheckpointError, UnreadableCheckpointError
from mefn_jax.runtime import checkpoint
from mefn_jax.runtime.checkpoint import Checkpoints


def test_full_disk_leaves_earlier_checkpoint_intact(tmp_path, command, cache):
    """Limits files to 20 kB, so that writing a checkpoint fails as on a full disk."""
    options = ("--config.train.save_every=4", "--config.train.eval_every=100")
    command("train.py", SMOKE, f"--workdir={tmp_path}", *options, "--config.train.steps=4")
    before = read_state(tmp_path)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    # The compiled programs of the run before are read; none can be written.
    env = environment(cache) | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e6"}
    full = subprocess.run(
        [sys.executable, "train.py", SMOKE, f"--workdir={tmp_path}", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        preexec_fn=limit,
    )
    assert full.returncode == 1, full.stdout + full.stderr
    errors = re.findall(r"error: \S+/checkpoints: could not save the checkpoint of step 8 .*", full.stderr)
    assert len(errors) == 1
    assert "Earlier checkpoints are intact" in errors[0]
    assert "orbax/checkpoint/_src" not in full.stderr  # no traceback from Orbax's threads
    assert_equal_states(before, read_state(tmp_path))
    text = command("train.py", SMOKE, f"--workdir={tmp_path}", *options).stdout
    assert "resuming after 4" in text
    assert read_state(tmp_path)[0] == 8


@pytest.fixture(scope="module")
def eight_steps(start_training, tmp_path_factory):
    """The workdir of a run of eight steps with checkpoints of steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("eight_steps")
    (output,) = finish(
        start_training(workdir, 1, "--config.train.steps=8", "--config.train.save_every=4", "--profile=50:2")
    )
    assert "warning: no profile: this run did no step after step 50" in output
    return workdir


@pytest.mark.parametrize(("part", "processes"), [("meta", 1), ("state", 2)])
def test_unreadable_newest_checkpoint_is_passed_over(part, processes, eight_steps, start_training, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(eight_steps, workdir)
    for path in (workdir / "checkpoints" / "8" / part).glob("**/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    output = finish(start_training(workdir, processes, "--config.train.steps=8", "--config.train.save_every=2"))[0]
    assert "checkpoints/8: cannot be read as a checkpoint" in output
    assert f"moved unreadable checkpoints to {workdir}/unreadable" in output
    assert "resuming after 4" in output
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest == 8
        assert checkpoints.meta(8)["step"] == 8
    assert (workdir / "unreadable" / "8").is_dir()
    assert set(logged(workdir, "loss")) == set(range(1, 9))


def test_unreadable_only_checkpoint_is_kept(eight_steps, start_training, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(eight_steps, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    for path in (workdir / "checkpoints" / "8" / "meta").glob("**/*"):
        if path.is_file():
            path.write_bytes(b"{")
    (output,) = finish(start_training(workdir, 1, "--config.train.steps=9"), status=1)
    assert "there is no other that can be read: remove it to start anew" in output
    assert (workdir / "checkpoints" / "8").is_dir()


def test_checkpoint_of_newer_format_does_not_count_as_unreadable(eight_steps, monkeypatch):
    """Training moves unreadable checkpoints away; one of another format must stay."""
    number = checkpoint.CHECKPOINT_FORMAT.number
    monkeypatch.setattr(
        checkpoint, "CHECKPOINT_FORMAT", dataclasses.replace(checkpoint.CHECKPOINT_FORMAT, number=number - 1)
    )
    message = f"/8: has format {number}, written by a newer version"
    with Checkpoints(eight_steps) as checkpoints, pytest.raises(CheckpointError, match=message) as raised:
        checkpoints.meta(8)
    assert not isinstance(raised.value, UnreadableCheckpointError)
