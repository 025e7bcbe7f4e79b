"""`train.py --print_config`: every option with its value, origin and comment."""

import ast
import re

import pytest

from configs import flickr30k, shapes
from mefn_jax.config import flatten
from mefn_jax.matching.systems import MODELS
from mefn_jax.print_config import format_config

LINE = re.compile(r"(?P<key>[\w.]+) = (?P<value>.*?)  \[(?P<origin>[^]]*)\]  (?P<comment>\S.*)")


def parse(text: str) -> dict[str, dict]:
    """Returns value, origin and comment by option; each line must have all three."""
    lines = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(lines), [line for line in text.splitlines() if not LINE.fullmatch(line)]
    return {line["key"]: line.groupdict() for line in lines}


def test_print_config_names_origin_of_every_value(command):
    arguments = ("--config=configs/shapes.py:model=scan_i2t_lse", "--config.train.learning_rate=2e-3")
    printed = command("train.py", *arguments, "--config.matcher.lse_factor=7", "--print_config").stdout
    options = parse(printed)
    expected = {
        "train.weight_decay": ("0.05", "default"),
        "matcher.hub_vectors": ("0", "default"),
        "matcher.direction": ("'i2t'", "model=scan_i2t_lse"),
        "matcher.inverse_temperature": ("4.0", "model=scan_i2t_lse"),
        "loss.hard_negative_ramp": ("500", "model=scan_i2t_lse"),
        "loss.name": ("'info_nce'", "configs/shapes.py"),
        "embed_dim": ("128", "configs/shapes.py"),
        "train.learning_rate": ("0.002", "command line"),
        "matcher.lse_factor": ("7.0", "command line"),
    }
    found = {key: (options[key]["value"], options[key]["origin"]) for key in expected}
    assert found == expected
    assert "matcher.entropy" not in options  # an option of another system
    assert options["train.weight_decay"]["comment"] == "on matrices; not on biases, norms and scalars"
    assert options["matcher.direction"]["comment"].startswith('"t2i" or "i2t"')


@pytest.mark.parametrize("model", MODELS)
def test_format_config_has_value_and_comment_of_every_option(model):
    config = flickr30k.get_config(f"model={model}")
    options = parse(format_config(config, "configs/flickr30k.py", []))
    values = flatten(config.to_dict())
    assert options.keys() == values.keys()
    assert {key: ast.literal_eval(option["value"]) for key, option in options.items()} == values
    assert {option["origin"] for option in options.values()} <= {"default", f"model={model}", "configs/flickr30k.py"}


def test_format_config_of_requirement_is_that_of_the_system():
    """What a system requires holds whatever the configuration file says."""
    options = parse(format_config(shapes.get_config("model=clip"), "configs/shapes.py", []))
    assert options["loss.name"]["origin"] == "model=clip"
