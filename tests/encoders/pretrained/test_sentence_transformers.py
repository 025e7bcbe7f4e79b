"""Notes about the parts of a sentence-transformers checkpoint that are not read."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mefn_jax.encoders.pretrained.sentence_transformers import note_unread_modules
from mefn_jax.errors import WeightsError

TYPE = "sentence_transformers.models."


def write(directory, modules, pooling):
    for name, value in (("modules.json", modules), ("1_Pooling/config.json", pooling)):
        if value is not None:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(json.dumps(value))


def list_modules(*names):
    return [{"idx": k, "path": f"{k}_{n}" if k else "", "type": TYPE + n} for k, n in enumerate(names)]


@pytest.mark.parametrize(
    ("modules", "mode", "text_pooling", "expected"),
    [
        (
            ["Transformer", "Pooling", "Normalize"],
            {"pooling_mode_mean_tokens": True},
            "tower",
            ["mean_tokens", "=mean "],
        ),
        (["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean", []),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode": "mean"},
            "tower",
            ["pools by mean", "text.pooling=tower is used"],
        ),
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True}, "tower", ["pools by cls_token"]),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            "mean",
            ["mean_tokens and max_tokens"],
        ),
        (["Transformer", "Pooling"], None, "mean", ["pools by unknown"]),
        (["Transformer", "Dense"], None, "tower", ["lists the module Dense (1_Dense), which is not read"]),
        (None, {"pooling_mode_max_tokens": True}, "tower", ["pools by max_tokens", "text.pooling=max is the nearest"]),
        (None, None, "tower", []),
    ],
)
def test_notes_say_what_is_not_read(modules, mode, text_pooling, expected, tmp_path, capsys):
    write(tmp_path, modules and list_modules(*modules), mode)
    note_unread_modules(tmp_path, text_pooling)
    text = capsys.readouterr().out
    assert text.count("note: ") == bool(expected)
    for words in expected:
        assert words in text


def test_note_about_lower_case(tmp_path, capsys):
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    note_unread_modules(tmp_path, "tower")
    assert "asks for lower case" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"idx": 0}, "must be a list of modules"),
        ([{"type": 3, "path": ""}], "must be a list of modules"),
        ([{"type": TYPE + "Pooling", "path": "../outside"}], "leaves the directory"),
        ([{"type": TYPE + "Pooling", "path": "/etc"}], "leaves the directory"),
        ([{"type": TYPE + "Pooling", "path": "x" * 5000}], "no usable file name"),
        ([{"type": TYPE + "Dense", "path": "2_Dense\nerror: x"}], "no usable name of a folder"),
        ([{"type": TYPE + "Pooling", "path": "\ud800"}], "no usable name of a folder"),
    ],
)
def test_unusable_modules_are_named(modules, message, tmp_path):
    write(tmp_path, modules, None)
    with pytest.raises(WeightsError, match=message) as error:
        note_unread_modules(tmp_path, "tower")
    assert "modules.json" in str(error.value)


TEXT = st.text(st.characters(exclude_categories=()), max_size=6)  # also line breaks and halves of characters
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["Pooling", "a.Pooling", "Dense", "1_Pooling", "", ".."]) | TEXT
KEYS = st.sampled_from(["pooling_mode", "pooling_mode_mean_tokens", "pooling_mode_a\nb", "do_lower_case"]) | TEXT


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.fixed_dictionaries({"type": NAMES, "path": NAMES}, optional={"idx": JSON}), max_size=3) | JSON,
    st.dictionaries(KEYS, JSON | st.just(True), max_size=3) | JSON,
)
def test_notes_are_lines_or_our_error(tmp_path, capsys, modules, pooling):
    write(tmp_path, modules, pooling)
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(pooling))
    printed = str(tmp_path)
    try:
        note_unread_modules(tmp_path, "mean")
    except WeightsError as e:
        printed = str(e)
    for line in [*printed.splitlines(), *capsys.readouterr().out.splitlines()]:
        assert str(tmp_path) in line
