"""Models on the Hugging Face hub: read from its local cache without a network, pushed to a stand-in."""

import inspect
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants

import mefn_jax
from mefn_jax.errors import CheckpointError, ConfigError
from mefn_jax.evaluation import hub
from mefn_jax.evaluation.evaluate import evaluate
from mefn_jax.evaluation.run import Gallery, TrainedRun
from mefn_jax.export.push import push_folder

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(small_export, tmp_path, monkeypatch):
    """The hub's local cache with `small_export` as somebody/model, without a network; the current directory is empty.
    As in a real cache, a revision's files are links to those of all revisions."""
    repository = tmp_path / "cache" / "models--somebody--model"
    snapshot, blobs = repository / "snapshots" / REVISION, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs", tmp_path / "here"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for path in small_export.iterdir():
        shutil.copyfile(path, blobs / f"blob-of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-of-{path.name}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "here")
    return snapshot


def test_model_loads_by_name_and_is_evaluated_below_runs(cached, small_export, capsys):
    model, same = mefn_jax.load("somebody/model"), mefn_jax.load(small_export)
    assert (
        f"somebody/model: the model of this name on the Hugging Face hub, revision {REVISION}"
        in capsys.readouterr().out
    )
    jax.tree.map(np.testing.assert_array_equal, model.params, same.params)
    result = evaluate(TrainedRun("somebody/model"), Gallery(split="val"))
    assert str(result.folder) == "runs/somebody/model/eval/val"
    assert {path.name for path in cached.iterdir()} == {path.name for path in small_export.iterdir()}


def test_only_files_that_are_read_are_downloaded(cached, monkeypatch):
    calls = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: calls.append((name, options)) or str(cached)
    )
    assert hub.download_model("somebody/model") == str(cached)
    assert calls == [("somebody/model", {"allow_patterns": ["config.json", "model.safetensors", "tokenizer.json"]})]


def test_link_out_of_cache_is_refused(cached, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (cached / "config.json").unlink()
    (cached / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="leaves the directory"):
        mefn_jax.load("somebody/model")


def test_missing_model_is_explained(cached):
    message = "nobody/none: no such directory, and not available from the Hugging Face hub .*OWNER/NAME"
    with pytest.raises(CheckpointError, match=message):
        mefn_jax.load("nobody/none")


def test_paths_of_this_machine_are_no_names(cached):
    (cached.parent / "runs" / "one").mkdir(parents=True)
    assert hub.is_hub_name("somebody/model")
    for name in (
        "/somebody/model",
        "./model",
        "../model",
        "model",
        "a/b/c",
        "gs://a/b",
        "~/b",
        "a b/c",
        "-/..",
        "",
        "x" * 300 + "/y",
    ):
        assert not hub.is_hub_name(name), name
    shutil.copytree(cached.parent / "runs", "runs")
    assert not hub.is_hub_name("runs/one")
    assert not hub.is_hub_name("runs/two")  # a path that is missing, not somebody's model


def test_push_uploads_files_of_export_alone(exported, monkeypatch, capsys):
    calls = []

    class Api:
        """A stand-in of `HfApi` that records the calls."""

        def create_repo(self, repo_id, **options):
            calls.append(("create_repo", repo_id, options))

        def upload_folder(self, **options):
            calls.append(("upload_folder", options))
            return "https://hub/somebody/model"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    push_folder(exported, "somebody/model", True)
    created, (_, upload) = calls
    assert created == ("create_repo", "somebody/model", {"repo_type": "model", "private": True, "exist_ok": True})
    assert (upload["repo_id"], upload["folder_path"], upload["repo_type"]) == ("somebody/model", exported, "model")
    assert {path.name for path in exported.iterdir()} <= set(upload["allow_patterns"])
    assert not [pattern for pattern in upload["allow_patterns"] if "*" in pattern or "eval" in pattern]
    assert "pushed" in capsys.readouterr().out
    for name, options in (("create_repo", created[2]), ("upload_folder", upload)):  # the real ones take the same
        known = inspect.signature(getattr(huggingface_hub.hf_api.HfApi, name)).parameters
        assert options.keys() <= known.keys(), name


def test_push_that_hub_refuses_is_explained(exported, monkeypatch):
    class Api:
        """A stand-in of `HfApi` without rights."""

        def create_repo(self, *_, **__):
            raise PermissionError("403 Forbidden\nmore")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(ConfigError, match=r"--push=a/b: the hub refuses \(PermissionError: 403 Forbidden\); log in"):
        push_folder(exported, "a/b", False)
    assert (exported / "config.json").is_file()
