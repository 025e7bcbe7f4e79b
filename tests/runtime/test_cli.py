"""Flags that are paths or numbers, and configuration files that are none."""

import os

import pytest
from commands import SMOKE, refusal

from mefn_jax.errors import ConfigError
from mefn_jax.runtime.cli import parse_count
from mefn_jax.runtime.storage import expand_home


@pytest.mark.parametrize(
    "text", ["", "\N{SUPERSCRIPT TWO}", "1,1", "-1", "+1", " 1", "1_0", "1e3", "\u0661", "10" * 12]
)
def test_parse_count_refuses_texts_that_int_refuses_or_reads_otherwise(text):
    assert parse_count(text) is None


def test_parse_count_reads_digits():
    assert [parse_count(text) for text in ("0", "7", "0012", "1000000000")] == [0, 7, 12, 10**9]


def test_expand_home_refuses_unknown_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expand_home("~/runs") == "/home/somebody/runs"
    assert [expand_home(path) for path in ("a~b", "./~x", "gs://bucket/~", "")] == ["a~b", "./~x", "gs://bucket/~", ""]
    with pytest.raises(ConfigError, match=r"~nobody_of_this_name/x: there is no home .*; write \./~nobody"):
        expand_home("~nobody_of_this_name/x")


@pytest.mark.parametrize(
    "words",
    [
        ("train.py", SMOKE, "--config.data.dir=~/nowhere"),
        ("eval.py", "--workdir=~/nowhere"),
        ("eval.py", "compare", "~/nowhere", "--out=x"),
        ("train.py", "--config=~/nowhere.py"),
    ],
)
def test_commands_expand_home_in_paths(words, command):
    assert f"{os.path.expanduser('~')}/nowhere" in refusal(command, *words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# Heading\n\nsome prose\n", "not a configuration file in Python (invalid syntax, line 3)"),
        (
            "def get_config(argument=None):\n    return 1 / 0\n",
            "fails in line 2 (ZeroDivisionError: division by zero)",
        ),
        ("import nothing_of_this_name\n", "fails in line 1 (ModuleNotFoundError"),
        ("x = 1\n", "has no function get_config"),
    ],
)
def test_configuration_file_that_is_none_is_named(content, message, tmp_path, command):
    path = tmp_path / "README.md"
    path.write_text(content)
    error = refusal(command, "train.py", f"--config={path}", f"--workdir={tmp_path}")
    assert f"--config={path}: " in error
    assert message in error
