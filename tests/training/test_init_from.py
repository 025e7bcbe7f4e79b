"""A run that begins with the parameters of another one, or of an exported model."""

import re
import shutil

import jax
import numpy as np
import pytest
from commands import SMOKE, read_state

from configs import shapes
from mefn_jax.errors import CheckpointError, ConfigError
from mefn_jax.evaluation.exported import name_variables
from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.export.__main__ import export_run
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.training import setup
from mefn_jax.training.init_from import Source, check_towers, load_source, note_differences


def make_config(source, model="mefn", **train):
    """The configuration of a run that begins from `source`."""
    config = shapes.get_config(f"smoke,model={model}")
    with config.unlocked():
        config.train.update(init_from=str(source), **train)
    return config


@pytest.fixture(scope="module")
def model(trained):
    """The variables of `trained`, by path, and its step."""
    _, variables, step = TrainedRun(trained[0]).load()
    return {name: np.asarray(x) for name, x in name_variables(variables).items()}, step


def test_command_begins_with_parameters_of_export_and_resumes_without_it(trained, model, tmp_path, command):
    source, run = tmp_path / "model", tmp_path / "run"
    export_run(TrainedRun(trained[0]), source)
    options = ("eval_every=100", "learning_rate=1e-30", "weight_decay=0.0", f"init_from={source}")
    words = ["train.py", SMOKE, f"--workdir={run}", *(f"--config.train.{option}" for option in options)]
    printed = command(*words, "--config.train.steps=1").stdout
    assert f"train.init_from={source}: begins with the parameters of step {model[1]}" in printed
    _, state = read_state(run)
    for name, value in model[0].items():
        part = "/" if name.startswith("constants/") else "/params/"
        np.testing.assert_allclose(state[part + name], value, rtol=0, atol=1e-20, err_msg=name)
    meta = TrainedRun(run, "latest").read_meta(1)
    assert meta["config"]["train"]["init_from"] == str(source)
    assert meta["tokenizer"] == (source / "tokenizer.json").read_text()
    shutil.rmtree(source)
    printed = command(*words, "--config.train.steps=2").stdout
    assert "resuming after 1" in printed
    assert "begins with the parameters" not in printed


def test_run_of_another_system_takes_what_it_has_in_common(trained, model, tmp_path):
    config, mesh = make_config(trained[0], "vsepp", init_new="^(matcher|loss|text/words)/"), make_mesh()
    with Checkpoints(tmp_path, create=True) as checkpoints:
        run = setup.set_up_run(setup.open_data(config, mesh), checkpoints, tmp_path, mesh)
    begun = name_variables(run.state.variables)
    common = [name for name in model[0] if name.startswith(("image/", "text/backbone/"))]
    assert len(common) > 20
    for name in common:
        np.testing.assert_array_equal(begun[name], model[0][name], err_msg=name)
    assert np.abs(begun["text/words/kernel"] - model[0]["text/words/kernel"]).max() > 1e-3


def make_source(variables, may_differ=""):
    return Source("runs/a", None, "", variables, re.compile(may_differ) if may_differ else None)


def test_parameters_that_do_not_fit_are_named_in_one_error():
    own = {"image": {"kernel": np.zeros((2, 3), np.float32)}, "matcher": {"gate": np.float32(0)}, "constants": {}}
    other = {"image": {"kernel": np.ones((2, 4), np.float32)}, "loss": {"scale": np.float32(1)}, "constants": {}}
    with pytest.raises(CheckpointError) as raised:
        make_source(other).insert(own)
    message = str(raised.value)
    for part in (
        "train.init_from=runs/a: ",
        "missing matcher/gate float32 ()",
        "surplus loss/scale float32 ()",
        "image/kernel is float32 (2, 4), not float32 (2, 3)",
        "train.init_new",
    ):
        assert part in message, message
    assert "\n" not in message
    with pytest.raises(CheckpointError, match=r"configuration: image/kernel is float32 \(2, 4\), not .*; give the"):
        make_source(other, "^(loss|matcher)/").insert(own)
    kept = make_source(other, "^(loss|matcher|image)/").insert(own)
    jax.tree.map(np.testing.assert_array_equal, kept, own)


def test_adapters_begin_anew_and_constants_are_taken():
    own = {"image": {"kernel": np.zeros(3)}, "lora": {"up": np.zeros(2)}, "constants": {"matcher": {"a": np.zeros(1)}}}
    other = {"image": {"kernel": np.ones(3)}, "constants": {"matcher": {"a": np.ones(1)}}}
    taken = make_source(other).insert(own)
    expected = {"image": {"kernel": np.ones(3)}, "lora": {"up": np.zeros(2)}} | {"constants": other["constants"]}
    jax.tree.map(np.testing.assert_array_equal, taken, expected)
    assert make_source(other).takes_all(own)
    assert not make_source(other, "^matcher/").takes_all(own)
    kept = make_source(other, "^matcher/").insert(own)
    assert kept["constants"]["matcher"]["a"] == 0


def test_contradicting_options_are_refused(trained, capsys):
    with pytest.raises(ConfigError, match=r"train.init_new: '\(' is no regular expression"):
        load_source(make_config(trained[0], init_new="("))
    with pytest.raises(ConfigError, match=r"train\.init_new needs train.init_from"):
        load_source(make_config("", init_new="^loss/"))
    with pytest.raises(CheckpointError, match="no checkpoints here"):
        load_source(make_config("/nowhere"))
    config, source = make_config("a"), make_config("a")
    with config.unlocked():
        config.image.pretrained = "google/vit"
    with pytest.raises(ConfigError, match=r"image.pretrained=google/vit: train.init_from=a gives this tower \(not pre"):
        check_towers(config, source)
    with config.unlocked():
        config.image.update(pretrained="", mean=(0.1, 0.2, 0.3))
    note_differences(config, Source("a", source, "", {}, None))
    assert capsys.readouterr().out == "note: image.mean is [0.5, 0.5, 0.5] in a and [0.1, 0.2, 0.3] here\n"
    with config.unlocked():
        config.text.lower_case = False
    with pytest.raises(ConfigError, match=r"text\.lower_case=False, but True in train.init_from=a, whose tokenizer"):
        note_differences(config, Source("a", source, "", {}, None))


def test_differences_of_two_systems_leave_out_options_of_one_alone(capsys):
    configs = [shapes.get_config(f"smoke,model={name}") for name in ("sfe", "mate")]
    note_differences(configs[0], Source("a", configs[1], "", {}, None))
    notes = capsys.readouterr().out
    assert "note: model is 'mate' in a and 'sfe' here\n" in notes
    assert "None" not in notes
    with pytest.raises(CheckpointError, match="model: 'mate' there, 'sfe' here") as raised:
        setup.check_resumes(configs[0], configs[1].to_dict(), "run")
    assert "None" not in str(raised.value)
