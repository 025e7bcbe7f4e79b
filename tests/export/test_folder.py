"""An exported model gives the results of its run to the last digit, without the run and whatever it was trained on."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import assert_same_results, refusal
from safetensors.numpy import load_file
from sample_data import write_precomputed

import mefn_jax
from configs import flickr30k
from mefn_jax.config import diff_configs
from mefn_jax.errors import CheckpointError, ConfigError
from mefn_jax.evaluation.ensemble import describe_run
from mefn_jax.evaluation.evaluate import evaluate
from mefn_jax.evaluation.run import Gallery, TrainedRun
from mefn_jax.export.__main__ import export_run
from mefn_jax.export.folder import check_out, leave_unknown_out, write_folder
from mefn_jax.reports.compare import read_evaluation
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.training import setup


def test_export_of_drawn_scenes_evaluates_by_command_as_its_deleted_run(trained, tmp_path, command):
    run, out = shutil.copytree(trained[0], tmp_path / "run"), tmp_path / "models" / "model"
    shutil.rmtree(run / "eval", ignore_errors=True)
    command("eval.py", f"--workdir={run}", "--split=val", f"--out={tmp_path / 'before'}")
    printed = command("-m mefn_jax.export", f"--workdir={run}", f"--out={out}", "--license=cc-by-4.0").stdout
    assert f"wrote {out}: mefn, step " in printed
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    shutil.rmtree(run)
    command("eval.py", f"--workdir={out}", "--split=val")
    assert_same_results(tmp_path / "before", out / "eval" / "val")
    files = {path.name for path in out.iterdir()}
    assert files == {
        "README.md",
        "config.json",
        "eval",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
    }
    again = refusal(command, "-m mefn_jax.export", f"--workdir={trained[0]}", f"--out={out}")
    assert f"--out={out}: holds eval besides an exported model; move it away" in again


def test_export_of_regions_and_adapted_pretrained_tower_has_merged_weights(towers):
    data, run, out = towers / "data", towers / "run", towers / "model"
    for split, images in (("train", 20), ("dev", 6)):
        write_precomputed(data, split, images, shape=(5, 8))
    config = flickr30k.get_config("image=regions,model=vsepp,smoke")
    with config.unlocked():
        config.data.dir, config.text.pretrained = str(data), str(towers / "bert")
        config.text.max_tokens = 10
        config.train.lora.rank = 2
    with Checkpoints(run, create=True) as checkpoints:
        begun = setup.set_up_run(setup.open_data(config, make_mesh()), checkpoints, run, make_mesh())
        params = begun.state.params
        moved = params | {"lora": jax.tree.map(lambda x: x + 0.01, params["lora"])}  # `up` begins as zeros
        checkpoints.save(1, begun.state.replace(params=moved), begun.meta | {"examples": 1})
    evaluate(TrainedRun(run), Gallery(split="val"), out=str(towers / "before"))
    export_run(TrainedRun(run), out)
    for folder in ("run", "bert"):
        shutil.rmtree(towers / folder)
    evaluate(TrainedRun(out), Gallery(split="val"))
    assert_same_results(towers / "before", out / "eval" / "val")
    assert not (out / "preprocessor_config.json").exists()
    tensors = load_file(out / "model.safetensors")
    assert not [name for name in tensors if "lora" in name]
    adapter = moved["lora"]["text"]["backbone"]["layer_0"]["attention"]["query"]
    added = 16.0 / 2 * np.asarray(adapter["down"]) @ np.asarray(adapter["up"])
    assert np.abs(added).max() > 1e-4
    whole = params["text"]["backbone"]["layer_0"]["attention"]["query"]["kernel"] + added
    np.testing.assert_allclose(tensors["text/backbone/layer_0/attention/query/kernel"], whole, atol=1e-6)


def test_export_of_averaged_parameters(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_run(TrainedRun(small_run, "latest", ema=True), "model")
    run = TrainedRun("model")
    _, averaged, step = TrainedRun(small_run, "latest", ema=True).load()
    for ema in (False, True):
        _, loaded, loaded_step = TrainedRun("model", ema=ema).load()
        assert loaded_step == step
        jax.tree.map(np.testing.assert_array_equal, loaded, averaged)
    result = evaluate(run, Gallery(split="val"))
    assert result.report["evaluated"] == "mefn, averaged parameters"
    assert result.folder.resolve() == tmp_path / "model" / "eval" / "val_ema"
    assert read_evaluation(Path("model"), "val").metrics["rsum"] == result.report["rsum"]
    assert describe_run(run) == describe_run(TrainedRun("model", ema=True)) == "model, averaged parameters"


def test_exported_model_is_of_one_step_without_average(small_export):
    step = TrainedRun(small_export).load()[2]
    assert TrainedRun(small_export, step).load()[2] == TrainedRun(small_export, "latest").load()[2] == step
    with pytest.raises(CheckpointError, match=rf"--step={step + 1}: .* is the exported model of step {step} alone"):
        TrainedRun(small_export, step + 1).load()
    with pytest.raises(CheckpointError, match="was exported without averaged parameters; leave --ema out"):
        TrainedRun(small_export, ema=True).load()


def test_exported_model_loads_in_python_and_is_exported_again(small_run, small_export, tmp_path):
    first, second = mefn_jax.load(small_run), mefn_jax.load(str(small_export))
    texts = [model.encode_texts(["a red circle", "a blue square"]) for model in (first, second)]
    jax.tree.map(np.testing.assert_array_equal, *texts)
    assert not diff_configs(first.config.to_dict(), second.config.to_dict())
    export_run(TrainedRun(small_export), tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (small_export / name).read_bytes(), name


def test_index_of_run_serves_its_export_and_comparison_takes_both(small_run, small_export, folder, tmp_path, command):
    index = tmp_path / "index"
    command("eval.py", "index", f"--workdir={small_run}", f"--images={folder / 'below'}", f"--out={index}")
    exported, found = shutil.copytree(small_export, tmp_path / "model"), []
    for model in (small_run, exported):
        words = (f"--workdir={model}", f"--index={index}", "--caption=a red circle", "--top_k=2")
        lines = command("eval.py", "search", *words).stdout.splitlines()
        found.append([line for line in lines if not line.startswith("loaded in")])
    assert found[0] == found[1]
    assert sum(".png" in line for line in found[0]) == 2
    evaluate(TrainedRun(exported), Gallery(split="val"))
    table = command("eval.py", "compare", small_run, exported, "--split=val", f"--out={tmp_path / 'table'}").stdout
    assert table.count("mefn") >= 2


def test_folder_is_complete_or_absent_and_replaces_exports_alone(small_run, exported, tmp_path, monkeypatch):
    before = (exported / "config.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        for out in (exported, tmp_path / "new"):
            with pytest.raises(ConfigError, match=f"--out={out}: cannot be written .*No space left"):
                write_folder(out, {"config.json": b"{}"})
    assert (exported / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export_run(TrainedRun(small_run), exported)
    assert (exported / "config.json").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "link").symlink_to(exported)
    for name, message in (
        ("full", "exists and is no exported model"),
        ("full/notes.txt", "is a file or a link"),
        ("link", "is a file or a link"),
    ):
        with pytest.raises(ConfigError, match=f"--out={tmp_path / name}: {message}"):
            export_run(TrainedRun(small_run), tmp_path / name)
    with pytest.raises(ConfigError, match="give a folder on this machine"):
        export_run(TrainedRun(small_run), "gs://bucket/model")


class Killed(BaseException):
    """The end of a process, which no `except` or `finally` of the export outlives."""


def test_model_that_a_killed_export_moved_away_is_named_and_comes_back(small_run, exported, monkeypatch, capsys):
    before = (exported / "config.json").read_bytes()

    def die(*_, **__):
        raise Killed

    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", lambda *x: die() if x[0].name.endswith(".part") else rename(*x))
        patch.setattr("shutil.rmtree", lambda path, **_: die() if path.exists() else None)
        with pytest.raises(Killed):
            write_folder(exported, {"config.json": b"{}"})
    left = next(exported.parent.glob(".model.*.old"))
    (exported.parent / ".model.x.old").mkdir()  # another name
    with pytest.raises(CheckpointError, match=f"{exported}: an export to this folder was killed .*; {left} is the"):
        TrainedRun(exported).load()
    assert check_out(exported) == exported
    assert f"note: {exported} has its earlier content again" in capsys.readouterr().out
    assert (exported / "config.json").read_bytes() == before
    shutil.copytree(exported, left)  # of an export that was killed after its second renaming
    write_folder(exported, {"config.json": before})
    assert not left.exists()
    assert (exported.parent / ".model.x.old").exists()


def test_export_leaves_out_options_that_do_not_exist_and_names_them(capsys):
    config = flickr30k.get_config("model=vsepp").to_dict()
    changed = config | {"note": "x", "train": config["train"] | {"lora": config["train"]["lora"] | {"rang": 2}}}
    assert leave_unknown_out(changed) == config
    assert changed["train"]["lora"]["rang"] == 2
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"note: {key} is no option, and is left out" for key in ("train.lora.rang", "note")]


def test_command_refuses_wrong_names_before_work(small_run, tmp_path, command):
    words = ("-m mefn_jax.export", f"--workdir={small_run}", f"--out={tmp_path / 'model'}")
    assert "--license=My Own: give an identifier" in refusal(command, *words, "--license=My Own")
    assert "--push=me: give OWNER/NAME" in refusal(command, *words, "--push=me")
    assert "no checkpoints here" in refusal(command, *words[:1], f"--workdir={tmp_path}", words[2])
    assert not (tmp_path / "model").exists()
