"""Grid of a sweep: values of options, of which all combinations are run. Checked before anything runs."""

import re

from ml_collections import ConfigDict

from mefn_jax.config import flatten, get_dotted, suggest
from mefn_jax.errors import ConfigError, reason
from mefn_jax.resolve import check_options
from mefn_jax.sweeps.plan import PlannedRun, Sweep, list_arguments, load_config, parse_config

OWN_FLAGS = {"train.seed": "--seeds", "model": "--models"}  # options that the sweep has a flag of its own for
BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def parse_grid(texts: list[str]) -> dict[str, list[str]]:
    """Parses the values of `--grid`. Raises ConfigError if one is not KEY=VALUE,VALUE, or a key is there twice."""
    grid = {}
    for text in texts:
        key, _, values = text.partition("=")
        parts = split_values(values)
        if not key or not parts or not all(parts):
            raise ConfigError(
                f"--grid={text}: give KEY=VALUE,VALUE, such as train.learning_rate=1e-3,5e-4; a comma within a value "
                "stands in brackets or quotes, and an empty value is ''"
            )
        if key in grid:
            raise ConfigError(f"--grid={text}: {key} is given twice; put all its values into one --grid")
        grid[key] = [unquote(part) for part in parts]
    return grid


def split_values(text: str) -> list[str]:
    """Splits a text at its commas, but not within brackets or quotes: `"(7, 7),(7,)"` are two values. Returns an empty
    list if brackets or quotes do not match."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += BRACKETS.get(character, 0) if not quote else 0
        if depth < 0:
            return []
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [] if depth or quote else [part.strip() for part in parts]


def unquote(text: str) -> str:
    """Returns a text without the quotes around it, if the whole of it stands in quotes."""
    match = re.fullmatch(r"'([^']*)'|\"([^\"]*)\"", text)
    return (match[1] or match[2] or "") if match else text


def check_grid(plan: Sweep, runs: list[PlannedRun]) -> None:
    """Raises ConfigError if a key of the grid is no option, is chosen by another flag too, has a value that cannot be
    read or that is there twice, or if a combination cannot work that could without the grid. A configuration that
    cannot be read without the grid either is left to the runs to explain."""
    for key in plan.grid:
        if key in OWN_FLAGS:
            raise ConfigError(f"--grid={key}: is chosen by {OWN_FLAGS[key]}")
        if any(word.startswith(f"--config.{key}=") for word in plan.overrides):
            raise ConfigError(f"--grid={key}: --config.{key} is given, too; leave one of them out")
    for model in plan.models:
        config = load_config(list_arguments(plan, model, 0, {}))
        if config is None:
            continue
        for key, values in plan.grid.items():
            check_values(plan, model, config, key, values)
        if _explain(config) is None:
            for run in (run for run in runs if run.model == model and run.config is not None):
                if problem := _explain(run.config):
                    raise ConfigError(f"--grid: {run.name} cannot work: {problem}")


def check_values(plan: Sweep, model: str, config: ConfigDict, key: str, values: list[str]) -> None:
    """Raises ConfigError unless `key` is an option of a model's configuration, and `values` can be read as values of it
    that differ."""
    known = flatten(config.to_dict())
    if key not in known:
        raise ConfigError(f"--grid={key}: model={model} has no such option{suggest(key, known)}")
    read = []
    for value in values:
        try:
            read.append(get_dotted(parse_config(list_arguments(plan, model, 0, {key: value})), key))
        except Exception as e:  # the file is Python, which can raise anything
            raise ConfigError(
                f"--grid={key}={value}: cannot be read as a value of {key}, which is {known[key]!r} ({reason(e)})"
            ) from None
        if read[-1] in read[:-1]:
            raise ConfigError(f"--grid={key}: the value {value} is there twice; give every value once")


def _explain(config: ConfigDict) -> str | None:
    """Returns why a configuration cannot work; None if it can."""
    try:
        check_options(config)
    except ConfigError as e:
        return str(e)
    return None
