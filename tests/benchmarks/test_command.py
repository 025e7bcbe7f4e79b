"""`eval.py benchmark`: every benchmark end to end on small data in its published format, its files, and refusals."""

import json
import re

import benchmark_data as data
import numpy as np
import pytest
from commands import refusal

from mefn_jax.benchmarks.command import run_benchmark
from mefn_jax.benchmarks.registry import BENCHMARKS
from mefn_jax.benchmarks.results import read_benchmark
from mefn_jax.benchmarks.scorer import Scorer
from mefn_jax.errors import DataError, TrainingError, UserError

WRITERS = {
    "eccv": data.write_coco_test,
    "cxc": data.write_coco_test,
    "sugar_crepe": data.write_sugar_crepe,
    "winoground": data.write_winoground,
    "aro": data.write_aro,
    "valse": data.write_valse,
    "foil": data.write_foil,
    "twins": None,
    "cases": data.write_cases,
    "flickr8k_expert": data.write_judgements,
    "flickr8k_crowd": data.write_judgements,
    "xm3600": data.write_xm3600,
    "multi30k": data.write_multi30k,
    "languages": data.write_languages,
    "diagnosis": None,
    "classes": data.write_classes,
}


@pytest.fixture(scope="module")
def scorer(loaded):
    model, params, *_ = loaded
    return Scorer(model, params)


class Constant:
    """Scores that are all equal, of any model, or no numbers."""

    def __init__(self, scorer, value):
        self.wrapped, self.value = scorer, value

    def __getattr__(self, name):
        return getattr(self.wrapped, name)

    def scores(self, images, captions):
        return lambda rows, columns: np.full(
            (rows.stop - rows.start, columns.stop - columns.start), self.value, np.float32
        )


def make_data(name, root):
    if WRITERS[name]:
        WRITERS[name](root)
        return str(root)
    return ""


def test_every_benchmark_has_small_data():
    assert WRITERS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("name", WRITERS)
def test_benchmarks_run_end_to_end(name, scorer, tmp_path, capsys):
    data_dir, split = make_data(name, tmp_path / "data"), "test" if WRITERS[name] else "val"
    report = run_benchmark(name, scorer, "mefn", tmp_path / "out", data_dir=data_dir, split=split)
    printed = capsys.readouterr().out
    assert f"{name}, mefn: " in printed
    assert f"wrote {tmp_path / 'out'}/metrics.json and measures.npz" in printed
    stored, measures = read_benchmark(tmp_path / "out")
    assert stored["measures"] == json.loads(json.dumps(report["measures"]))
    assert len(measures) == len(stored["measures"]) > 0
    for entry in stored["measures"]:
        if entry["low"] is not None and entry["statistic"] == "ratio":
            assert entry["low"] <= entry["value"] <= entry["high"], entry


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.startswith(("flickr8k", "diagnosis"))])
def test_constant_scorer_gets_at_most_chance(name, scorer, tmp_path):
    data_dir, split = make_data(name, tmp_path / "data"), "test" if WRITERS[name] else "val"
    report = run_benchmark(name, Constant(scorer, 0.5), "constant", None, data_dir=data_dir, split=split)
    for entry in report["measures"]:
        assert entry["value"] <= entry["chance"] + 1e-9, entry


@pytest.mark.parametrize("name", ["flickr8k_expert", "flickr8k_crowd"])
def test_constant_scorer_has_no_tau(name, scorer, tmp_path):
    with pytest.raises(DataError, match=r"all.tau_b: .* undefined"):
        run_benchmark(name, Constant(scorer, 0.5), "constant", None, data_dir=make_data(name, tmp_path))


@pytest.mark.parametrize("name", WRITERS)
def test_scores_that_are_no_numbers_are_an_error(name, scorer, tmp_path):
    data_dir, split = make_data(name, tmp_path / "data"), "test" if WRITERS[name] else "val"
    with pytest.raises(TrainingError, match="is nan"):
        run_benchmark(name, Constant(scorer, np.nan), "broken", None, data_dir=data_dir, split=split)


def test_command_runs_cases_classes_and_diagnosis_of_a_trained_run(mefn_run, command, tmp_path):
    for name in ("cases", "classes", "diagnosis"):
        options = [f"--data_dir={make_data(name, tmp_path / name)}"] if WRITERS[name] else ["--split=val"]
        text = command("eval.py", "benchmark", name, f"--workdir={mefn_run}", *options).stdout
        assert f"wrote {mefn_run}/benchmarks/{name}/metrics.json" in text
    for sentence in ("Hubs: the 10 images", "Collapse: ", "Captions of ", "Captions without relation words"):
        assert sentence in text


def test_command_runs_the_twins_of_two_models_and_compare_joins_them(runs, command, tmp_path):
    for model in ("mefn", "vsepp"):
        command("eval.py", "benchmark", "twins", f"--workdir={runs[model]}", f"--out={tmp_path / model}")
    text = command("eval.py", "compare", tmp_path / "mefn", tmp_path / "vsepp", f"--out={tmp_path / 'table'}").stdout
    assert text.startswith("twins: ")
    assert "| measure | chance | mefn | vsepp | minus the first |" in text
    assert "| all, group | 16.7 |" in text


def test_command_scores_pretrained_towers(clip, command, tmp_path):
    """A CLIP that was not trained here, with two templates; files are written only into --out."""
    (tmp_path / "templates.txt").write_text("a {}\na dog and a {}\n")
    words = [f"--config.{kind}.pretrained={clip}" for kind in ("image", "text")] + ["--config.text.max_tokens=10"]
    words += [f"--data_dir={data.write_classes(tmp_path / 'classes')}", f"--templates={tmp_path / 'templates.txt'}"]
    config = "--config=configs/flickr30k.py:model=clip,image=clip_vit_b32,text=clip"
    text = command("eval.py", "benchmark", "classes", config, *words).stdout
    assert "classes, clip, zero-shot: 9 images, 3 classes, 2 templates; ties against the model" in text
    assert "wrote" not in text


def test_command_refuses_what_it_cannot_do(mefn_run, command, tmp_path):
    run = f"--workdir={mefn_run}"
    (tmp_path / "metrics.json").write_text("{}")
    expected = [
        (("benchmark", run), "give one of the benchmarks eccv, cxc"),
        (("benchmark", "sugarcrepe", run), "sugarcrepe: not one of the benchmarks"),
        (("benchmark", "twins", run, f"--out={tmp_path}"), "exists and was not written by this command"),
        (("benchmark", "twins", run, "--config=configs/shapes.py"), "not both"),
        (("benchmark", "twins", run, "--data_dir=gs://bucket/data"), "--data_dir=gs://bucket/data"),
    ]
    for words, message in expected:
        assert message in refusal(command, "eval.py", *words), words


def test_benchmarks_refuse_what_they_cannot_score(scorer, tmp_path):
    (tmp_path / "regions").mkdir()
    data.write_coco_test(tmp_path / "coco")
    (tmp_path / "coco" / "dataset_coco.json").unlink()
    np.save(tmp_path / "coco" / "testall_ims.npy", np.ones((10, 2, 3), np.float32))
    (tmp_path / "coco" / "testall_caps.txt").write_text("a dog\n" * 50)
    expected = [
        ("sugar_crepe", {}, "sugar_crepe: give --data_dir, the folder of its files; "),
        (
            "sugar_crepe",
            {"data_dir": str(tmp_path)},
            "no add_att.json or data/add_att.json in it; the subsets: https://",
        ),
        ("twins", {"split": "nothing"}, "no split 'nothing'"),
        ("eccv", {"data_dir": str(tmp_path / "coco")}, "image.arch=vit takes images, but the data set has precomputed"),
    ]
    for name, options, message in expected:
        with pytest.raises(UserError, match=re.escape(message)):
            run_benchmark(name, scorer, "mefn", None, **options)
