"""A data set that was made again with other content at the same path: resume, evaluation, ensemble and sweep notice."""

import json
import shutil

import numpy as np
import pytest
from sample_data import write_precomputed

from configs import precomputed
from mefn_jax.errors import CheckpointError, ConfigError, DataError
from mefn_jax.evaluation.ensemble import evaluate_ensemble
from mefn_jax.evaluation.evaluate import evaluate
from mefn_jax.evaluation.run import Gallery, TrainedRun
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.training import loop

SPLITS = (("train", 24), ("dev", 8), ("test", 8))


def write_data(folder, change="") -> None:
    """Writes regions with captions; `change` replaces what it names by something else of the same size."""
    shutil.rmtree(folder, ignore_errors=True)
    for split, images in SPLITS:
        rows = write_precomputed(folder, split, images, shape=(5, 8))
        path = folder / f"{split}_caps.txt"
        path.write_text(path.read_text().replace(split, "photo"))
        if change == "captions":
            path.write_text(path.read_text().replace("dog", "moon"))
        if change == "order":
            path.write_text("".join(reversed(path.read_text().splitlines(True))))
        if change == "regions":
            np.save(folder / f"{split}_ims.npy", rows + 1)
        if change == "ids":
            (folder / f"{split}_ids.txt").write_text("".join(f"image{k}\n" for k in range(images)))


def config_of(data, steps=2):
    config = precomputed.get_config("smoke,model=vsepp,text=gru")
    with config.unlocked():
        config.data.dir, config.train.steps, config.train.eval_every = str(data), steps, steps
        config.text.vocab_size, config.eval.batch_size, config.train.batch_size = 300, 8, 8
    return config


@pytest.fixture(scope="module")
def run_on_data(tmp_path_factory):
    """The workdir of a run, and its data set."""
    root = tmp_path_factory.mktemp("changed")
    write_data(root / "data")
    loop.train(config_of(root / "data"), root / "run")
    return root / "run", root / "data"


@pytest.mark.parametrize("change", ["captions", "order", "regions", "ids"])
def test_resume_and_evaluation_refuse_data_made_again_at_the_same_path(run_on_data, change):
    workdir, data = run_on_data
    write_data(data, change)
    try:
        part = "precomputed regions" if change == "regions" else "image ids or captions"
        with pytest.raises(CheckpointError, match=rf"run holds a run on other data: .*{part}.* choose another --workd"):
            loop.train(config_of(data, steps=4), workdir)
        with pytest.raises(DataError, match=rf"{part}.* of train.* have changed since the run was trained.*--data_dir"):
            evaluate(TrainedRun(workdir), Gallery())
    finally:
        write_data(data)
    assert not (workdir / "eval" / "test").exists()


def test_resume_takes_the_same_data_at_another_path(run_on_data, tmp_path, capsys):
    workdir, data = run_on_data
    shutil.copytree(workdir, tmp_path / "run")
    shutil.copytree(data, tmp_path / "moved")
    loop.train(config_of(tmp_path / "moved"), tmp_path / "run")
    assert "step 2 of 2 is done already" in capsys.readouterr().out
    evaluate(TrainedRun(tmp_path / "run"), Gallery(str(tmp_path / "moved")))
    assert "note: --data_dir" not in capsys.readouterr().out
    assert (tmp_path / "run" / "eval" / "test" / "metrics.json").is_file()


def test_checkpoint_without_digests_resumes_and_evaluates(run_on_data, monkeypatch, tmp_path):
    """As those of format 1 are, which did not keep them."""
    workdir, data = run_on_data
    meta = Checkpoints.meta
    monkeypatch.setattr(Checkpoints, "meta", lambda self, step: meta(self, step) | {"data": None})
    write_data(data, "captions")
    try:
        loop.train(config_of(data), workdir)
        evaluate(TrainedRun(workdir), Gallery(), out=str(tmp_path))
    finally:
        write_data(data)


def test_evaluation_of_other_data_keeps_the_run_s_own_and_says_what_is_unknown(run_on_data, tmp_path, capsys):
    workdir, _ = run_on_data
    result = evaluate(TrainedRun(workdir), Gallery())
    own = workdir / "eval" / "test" / "metrics.json"
    before = own.read_bytes()
    assert result.report["data"]["unknown_wordpieces"] == 0
    assert "0.0 % of the wordpieces of test are unknown to the model" in capsys.readouterr().out
    write_data(tmp_path / "other")
    (tmp_path / "other" / "test_caps.txt").write_text("\N{SNOWMAN} \N{COMET} dog\n" * 40)
    other = evaluate(TrainedRun(workdir), Gallery(str(tmp_path / "other")))
    printed = capsys.readouterr().out
    assert "warning: 66.7 % of the wordpieces of test are unknown to the model" in printed
    assert other.report["data"]["unknown_wordpieces"] == pytest.approx(200 / 3)
    assert other.report["data"]["gallery"] != result.report["data"]["gallery"]
    assert other.report["data"]["tokenizer"] == result.report["data"]["tokenizer"]
    (tmp_path / "third").mkdir()
    write_data(tmp_path / "third" / "other", "captions")
    evaluate(TrainedRun(workdir), Gallery(str(tmp_path / "third" / "other")))
    assert f"note: --data_dir={tmp_path / 'third' / 'other'} is not the data that" in capsys.readouterr().out
    for path in (tmp_path / "third" / "other").glob("*"):
        if not path.name.startswith("test"):
            path.unlink()  # without train, it is not known to be the run's data
    assert evaluate(TrainedRun(workdir), Gallery(str(tmp_path / "third" / "other"))).folder.name.startswith("test_ot")
    assert own.read_bytes() == before
    folders = sorted(path.name.split("-")[0] for path in (workdir / "eval").iterdir())
    assert folders == ["test", "test_other", "test_other"]
    assert (workdir / "eval" / "test" / "ranks.npz").is_file()


def test_ensemble_refuses_runs_on_other_captions_of_equal_numbers(run_on_data, tmp_path):
    workdir, _ = run_on_data
    write_data(tmp_path / "other")
    (tmp_path / "other" / "test_caps.txt").write_text("something else\n" * 40)

    class RunOnOtherData(TrainedRun):
        """The same run, whose configuration names other data."""

        def load(self):
            evaluator, params, step = super().load()
            evaluator.config.data.dir = str(tmp_path / "other")
            return evaluator, params, step

    with pytest.raises(ConfigError, match="has other images or captions in test than"):
        evaluate_ensemble([TrainedRun(workdir), RunOnOtherData(workdir)], Gallery(), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    report = evaluate_ensemble([TrainedRun(workdir)] * 2, Gallery(), str(tmp_path / "out"))
    assert report["data"]["gallery"] == evaluate(TrainedRun(workdir), Gallery()).report["data"]["gallery"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["format"] == 2


def test_evaluation_checks_what_it_writes_before_it_reads_the_run(tmp_path):
    """The workdir does not exist, so that whatever is refused is refused before the checkpoint is read."""
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "metrics.json").write_text('{"accuracy": 1}')
    nowhere = TrainedRun(tmp_path / "nowhere")
    for options, message in (
        ({"save_scores": str(tmp_path / "thesis.tex")}, r"--save_scores=.*thesis\.tex: give a \.npy file"),
        ({"save_scores": str(tmp_path)}, r"give a \.npy file"),
        ({"out": str(tmp_path)}, r"--out=.*: metrics\.json: exists and was not written by this command"),
        ({"out": str(tmp_path / "thesis.tex")}, "is a file; give a directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(nowhere, Gallery(), **options)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_scores_replace_those_of_a_gallery_of_the_same_size_alone(run_on_data, tmp_path):
    workdir, _ = run_on_data
    path = tmp_path / "scores.npy"
    np.save(path, np.zeros((3, 15), np.float32))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists and was not written by this command"):
        evaluate(TrainedRun(workdir), Gallery(), out=str(tmp_path / "out"), save_scores=str(path))
    assert path.read_bytes() == before
    np.save(path, np.zeros((8, 40), np.float32))
    evaluate(TrainedRun(workdir), Gallery(), out=str(tmp_path / "out"), save_scores=str(path))
    assert np.load(path).any()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out", "scores.npy"]
