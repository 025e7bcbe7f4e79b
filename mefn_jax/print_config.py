"""Prints a configuration: every option with its value, where the value comes from, and its comment
(`python train.py --config=... --print_config`)."""

import inspect
import re

from ml_collections import ConfigDict

from mefn_jax.config import flatten
from mefn_jax.configs import default
from mefn_jax.matching.systems import find_system

OPTION = re.compile(r"    c\.(?P<key>[\w.]+) = .*?  # (?P<comment>.*)")
FIELD = re.compile(r"^    (?P<names>\w+(?:, \w+)*): (?P<comment>(?:.|\n {8})*)", re.MULTILINE)


def format_config(config: ConfigDict, path: str, overrides: list[str]) -> str:
    """Returns one line for each option of a configuration: its value, its comment, and its origin, which is `default`,
    the system (`model=NAME`), the configuration file, or `command line`.

    Args:
        config: the configuration.
        path: the configuration file, as it is to be printed.
        overrides: the arguments of the command line.
    """
    system = find_system(config.model)
    base = flatten(default.base(config.model).to_dict()) | {"model": default.base().model}
    comments = read_comments() | read_field_comments(system.matcher)
    chosen = {match[1] for argument in overrides if (match := re.match(r"--config\.([\w.]+)", argument))}
    lines = []
    for key, value in flatten(config.to_dict()).items():
        if key in chosen:
            origin = "command line"
        elif key in system.requires or (key in system.defaults and value == base[key]):
            origin = f"model={config.model}"
        else:
            origin = "default" if value == base.get(key) else path
        lines.append(f"{key} = {value!r}  [{origin}]  {comments.get(key, '')}".rstrip())
    return "\n".join(lines)


def read_comments() -> dict[str, str]:
    """Returns the comments of `configs/default.py` by option."""
    return {match["key"]: match["comment"] for match in OPTION.finditer(inspect.getsource(default))}


def read_field_comments(matcher: type) -> dict[str, str]:
    """Returns the comments on the options of a matcher, from the docstrings of its class and of those above it."""
    comments = {}
    for cls in reversed(matcher.__mro__):
        for match in FIELD.finditer(inspect.cleandoc(cls.__doc__ or "")):
            comment = " ".join(match["comment"].split())
            comments |= {f"matcher.{name}": comment for name in match["names"].split(", ")}
    return comments
