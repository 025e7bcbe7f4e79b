"""The run and the gallery that the flags of `eval.py` name."""

import pytest
from absl import flags

from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.rerank import parse_rerank
from mefn_jax.evaluation.run import Gallery, TrainedRun, gallery_from_flags


@pytest.fixture
def gallery_of(monkeypatch):
    """`gallery_of(data_dir="", folds=("1",), split="test")` is the gallery that these values of the flags name."""

    def parse(data_dir="", folds=("1",), split="test"):
        values = flags.FlagValues()
        flags.DEFINE_string("data_dir", data_dir, "", flag_values=values)
        flags.DEFINE_list("folds", list(folds), "", flag_values=values)
        flags.DEFINE_string("split", split, "", flag_values=values)
        values.mark_as_parsed()
        monkeypatch.setattr(flags, "FLAGS", values)
        return gallery_from_flags()

    return parse


def test_gallery_from_flags_takes_other_names_of_splits(gallery_of):
    assert gallery_of(folds=("1", "5"), split="dev") == Gallery("", "val", (1, 5))
    assert gallery_of(data_dir="data/mine") == Gallery("data/mine")


@pytest.mark.parametrize("folds", [(), ("0",), ("1", "x"), ("-1",), ("\N{SUPERSCRIPT TWO}",), ("1", ""), ("9" * 23,)])
def test_gallery_from_flags_refuses_folds_that_are_no_numbers(gallery_of, folds):
    with pytest.raises(ConfigError, match=r"--folds=.*: give numbers of at least 1"):
        gallery_of(folds=folds)


def test_gallery_from_flags_refuses_a_number_of_folds_twice(gallery_of):
    with pytest.raises(ConfigError, match="--folds=1,5,01: give every number once"):
        gallery_of(folds=("1", "5", "01"))


@pytest.mark.parametrize("step", ["\N{SUPERSCRIPT TWO}", "1,1", "", "-1", "lastest", None, "9" * 23])
def test_run_refuses_step_that_is_no_number(step, tmp_path):
    with pytest.raises(ConfigError, match=f"--step={step}: not best, latest or the number of a step"):
        TrainedRun(tmp_path, step)
    assert TrainedRun(tmp_path, 12).step == 12


@pytest.mark.parametrize(
    "text", ["\N{SUPERSCRIPT TWO}", "1_0", "nan", "inf", "1,1", "-1", "1..2", "2.5", "0x1", "\u0661"]
)
def test_parse_rerank_refuses_what_is_no_number(text):
    with pytest.raises(ConfigError, match=f"--rerank={text}: give a share"):
        parse_rerank(text, 100)


def test_gallery_refuses_url():
    with pytest.raises(ConfigError, match="--data_dir=gs://x"):
        Gallery("gs://x")


def test_output_dir_separates_splits_and_averaged_parameters(tmp_path):
    run = TrainedRun(tmp_path, ema=True)
    assert TrainedRun(tmp_path).output_dir("val") == tmp_path / "eval" / "val"
    assert run.output_dir("val") == tmp_path / "eval" / "val_ema"
    assert run.output_dir("val", tmp_path / "out") == tmp_path / "out"
    assert run.output_dir("val", tmp_path / "out", "other") == tmp_path / "out"
    names = {run.output_dir("val", data_dir=str(tmp_path / folder / "my data")).name for folder in ("a", "b")}
    assert len(names) == 2
    assert all(name.startswith("val_ema_my_data-") for name in names)
