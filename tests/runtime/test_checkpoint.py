"""Checkpoints: a full disk, an unreadable newest checkpoint, an unreadable only one, other formats, and bit rot."""

import dataclasses
import json
import re
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, SMOKE, assert_equal_states, environment, finish, logged, read_state

from mefn_jax.errors import CheckpointError, UnreadableCheckpointError
from mefn_jax.runtime import checkpoint
from mefn_jax.runtime.checkpoint import Checkpoints


@pytest.mark.slow  # test_multihost.py kills a save
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


@pytest.mark.parametrize(
    ("part", "processes"),
    [("state", 1), pytest.param("state", 2, marks=pytest.mark.slow), pytest.param("meta", 1, marks=pytest.mark.slow)],
)
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


META = {"config": {"train": {"batch_size": 4, "betas": (0.9, 1e-8), "none": (), "text": ""}}, "tokenizer": "{}"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A workdir with one checkpoint, of step 3, and its state."""
    workdir, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    params = {"a": rng.normal(size=(40, 30)).astype(np.float32), "b": rng.normal(size=5).astype(np.float32)}
    state = jax.tree.map(jnp.asarray, {"params": params, "opt_state": (jnp.int32(3), params)})
    with Checkpoints(workdir, create=True) as checkpoints:
        meta = META | {"format": checkpoint.CHECKPOINT_FORMAT.number, "examples": 12}
        checkpoints.save(3, state, meta)
    return workdir, state


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def test_flipped_bits_are_noticed_or_change_nothing(small, tmp_path, caplog):
    """Flips a bit at many places in all files of a checkpoint."""
    workdir, state = small
    shutil.copytree(workdir, tmp_path / "run")
    files = [
        path for path in (tmp_path / "run" / "checkpoints" / "3").rglob("*") if path.stat().st_size * path.is_file()
    ]
    largest, rng, refused = max(files, key=lambda path: path.stat().st_size), np.random.default_rng(0), 0
    for k in range(24):
        path = largest if k % 2 else files[k // 2 % len(files)]
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            with Checkpoints(tmp_path / "run") as checkpoints:
                meta = checkpoints.meta(checkpoints.resolve_step("latest"))
                found = checkpoints.restore(3, abstract(state))
            jax.tree.map(np.testing.assert_array_equal, found, state)
            assert json.loads(json.dumps(meta["config"])) == json.loads(json.dumps(META["config"]))
        except CheckpointError:
            refused += 1
        path.write_bytes(original)
    assert refused >= 8
    assert not any("Traceback" in record.getMessage() or record.name == "asyncio" for record in caplog.records)


def test_restore_checks_the_leaves_that_it_reads(small, tmp_path, monkeypatch):
    _, state = small
    damaged = state | {"params": {"a": state["params"]["a"].at[7, 3].add(1e-7), "b": state["params"]["b"]}}
    compute = checkpoint.compute_checksums
    with Checkpoints(tmp_path, create=True) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(checkpoint, "compute_checksums", lambda _: compute(state))  # as if a bit changed on the disk
        checkpoints.save(3, damaged, META | {"format": checkpoint.CHECKPOINT_FORMAT.number, "examples": 12})
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            UnreadableCheckpointError, match=r"/3: cannot be read as a checkpoint .*params/a is damaged"
        ):
            checkpoints.restore(3, {"params": abstract(state["params"])})
        part = {"params": {"b": abstract(state["params"]["b"])}}
        np.testing.assert_array_equal(checkpoints.restore(3, part)["params"]["b"], state["params"]["b"])
        for wanted, message in (
            ({"params": {"c": abstract(state["params"]["b"])}}, "/3 has no params/c: it belongs to another model"),
            (
                {"params": {"b": jax.ShapeDtypeStruct((6,), jnp.float32)}},
                r"no params/b of float32\[6\], but of float32",
            ),
        ):
            with pytest.raises(CheckpointError, match=message):
                checkpoints.restore(3, wanted)


def test_renamed_step_and_damaged_rsum_are_named(small, tmp_path, capsys):
    shutil.copytree(small[0], tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "3").rename(folder / "9")
    with (
        Checkpoints(tmp_path / "run") as checkpoints,
        pytest.raises(CheckpointError, match="/9: is the checkpoint of step 3"),
    ):
        checkpoints.meta(9)
    for text in ('{"rsum": "x"}', '{"rsum": NaN}', "[]", "{"):
        (folder / "9" / "rsum.json").write_text(text)
        with Checkpoints(tmp_path / "run") as checkpoints:
            assert not checkpoints.is_evaluated(9)
            assert checkpoints.best == 9
        assert "9/rsum.json: cannot be read" in capsys.readouterr().out


def test_latest_two_and_best_are_kept(small, tmp_path):
    meta, state = META | {"format": checkpoint.CHECKPOINT_FORMAT.number, "examples": 0}, {"x": jnp.ones(2)}
    with Checkpoints(tmp_path, create=True) as checkpoints:
        for step, rsum in ((1, 5.0), (2, 7.0), (3, 6.0), (4, 7.0), (5, None), (6, 1.0), (7, 2.0)):
            checkpoints.save(step, state, meta)
            if rsum is not None:
                checkpoints.record_rsum(step, rsum)
        assert checkpoints.best == 4
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.best, checkpoints.latest) == (4, 7)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 6, 7]
