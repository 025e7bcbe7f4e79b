"""The card of an exported model: its data are read by `huggingface_hub`, and its command gives its recalls."""

import json
import re
import shlex
import shutil

import huggingface_hub
import pytest
import yaml

from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.export.__main__ import export_run
from mefn_jax.export.card import describe_data, describe_evaluated_data, evaluation_command, name_tower


@pytest.fixture(scope="module")
def card(small_export):
    return huggingface_hub.ModelCard.load(small_export / "README.md")


def test_card_is_read_with_its_recalls_and_fields(card, small_run):
    report = json.loads((small_run / "eval" / "val" / "metrics.json").read_text())
    assert report["step"] == 8
    expected = {f"{side}.r{k}": report[side][f"r{k}"] for side in ("i2t", "t2i") for k in (1, 5, 10)}
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == expected | {"rsum": report["rsum"]}
    assert {result.dataset_split for result in card.data.eval_results} == {"val"}
    assert (card.data.license, card.data.library_name) == ("unknown", "mefn-jax")
    assert yaml.safe_load(card.content.split("---\n")[1])["model-index"][0]["name"] == "model"
    for title in ("## Use", "## Data", "## Evaluation", "## License", "## Citation", "```bibtex"):
        assert title in card.text
    assert "drawn scenes" in card.text
    assert str(small_run.parent) not in card.content
    assert 'mefn_jax.load("model")' in card.text
    assert f"| {report['rsum']:.1f} |" in card.text


def test_command_of_card_gives_its_recalls(card, exported, command):
    (line,) = re.findall(r"^    python (eval\.py .*)", card.text, re.MULTILINE)
    words = shlex.split(line.replace("--workdir=model", f"--workdir={exported}"))
    assert f"--workdir={exported}" in words
    command(*words)
    report = json.loads((exported / "eval" / "val" / "metrics.json").read_text())
    (row,) = re.findall(r"^\| ([\d. |]+) \|$", card.text, re.MULTILINE)
    values = [report[side][f"r{k}"] for side in ("i2t", "t2i") for k in (1, 5, 10)]
    assert row.split(" | ") == [f"{value:.1f}" for value in [*values, report["rsum"]]]


def test_card_without_evaluation_of_its_checkpoint(small_run, tmp_path, capsys):
    """Evaluations of other parameters, and damaged ones, are left out."""
    run = shutil.copytree(small_run, tmp_path / "run")
    shutil.copytree(run / "eval" / "val", run / "eval" / "broken")
    (run / "eval" / "broken" / "metrics.json").write_text("{}")
    export_run(TrainedRun(run, ema=True), tmp_path / "model", "mit", "somebody/their-model")
    assert "note: the card leaves broken out" in capsys.readouterr().out
    card = huggingface_hub.ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "mit"
    assert card.data.eval_results is None
    assert "Not evaluated." in card.text
    assert 'mefn_jax.load("somebody/their-model")' in card.text
    assert "averages over the training" in card.text


@pytest.mark.parametrize(
    ("protocol", "more", "folder", "words"),
    [
        ({"split": "test", "folds": 1}, {}, "test", "--split=test"),
        ({"split": "test", "folds": 1}, {"other_folds": {"5": {}}}, "test_ema", "--split=test --folds=1,5"),
        ({"split": "val", "folds": 5}, {}, "val", "--split=val --folds=5"),
        ({"split": "val", "folds": 1}, {"certified": {}}, "val", "--split=val --certified"),
        ({"split": "val", "folds": 1}, {}, "val_f30k-0a1b2c", "--split=val --data_dir=DIR"),
    ],
)
def test_command_has_flags_of_evaluation(protocol, more, folder, words):
    assert evaluation_command({"protocol": protocol} | more, folder) == f"python eval.py --workdir={{}} {words}"


def test_card_names_towers_and_data_without_paths():
    assert name_tower("google/vit-base-patch16-224") == "google/vit-base-patch16-224"
    assert name_tower("/home/somebody/towers/vit") == "vit"
    assert describe_data({"data": {"dir": "/home/somebody/data/f8k"}}) == "f8k"
    assert describe_data({"data": {"dir": ""}}) == "drawn scenes"
    mixture = {"data": {"dir": "/home/somebody/a:0.7,/home/somebody/b:0.3"}}
    assert describe_data(mixture) == "a and b"
    for config, split, name in (
        (mixture, "val", "a"),
        (mixture, "train", "a and b"),
        ({"data": {"dir": "/other/c"}}, "val", "c"),
        ({}, "val", "a"),
    ):
        assert describe_evaluated_data({"config": config, "protocol": {"split": split}}, mixture) == name
