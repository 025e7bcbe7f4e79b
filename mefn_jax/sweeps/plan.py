"""Plan of a sweep: its runs in order, each with its directory and flags, and the division of the runs over jobs."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from mefn_jax import config as configuration
from mefn_jax.errors import ConfigError
from mefn_jax.reports.rows import IGNORED_KEYS

MAX_PARTS = 10_000  # more jobs than any sweep has


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs of models, options and seeds.

    Attributes:
        config: configuration file, with optional arguments after a colon.
        models, seeds: names of models, and seeds.
        grid: values of options by key, `{"train.learning_rate": ["1e-3", "5e-4"]}`; all combinations are run.
        out: directory of the runs, which also keeps their compiled programs.
        split: split to evaluate after training.
        overrides: flags that `train.py` gets in addition.
        part: `(k, n)`: only the k-th of n parts is run, counted from 1 (`choose_part`).
    """

    config: str
    models: list[str]
    seeds: list[int]
    grid: dict[str, list[str]]
    out: Path
    split: str
    overrides: list[str]
    part: tuple[int, int] = (1, 1)


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        model, grid, seed: the model, its options of the grid by key, and the seed.
        setting: the name of model and options, without the seed.
        workdir: its directory.
        arguments: the flags of `train.py` without `--workdir`.
        config: the configuration that they give; None if it cannot be loaded, which `train.py` will explain.
        chosen: dotted keys of the options that the command line sets.
    """

    model: str
    grid: dict[str, str]
    seed: int
    setting: str
    workdir: Path
    arguments: list[str]
    config: ConfigDict | None
    chosen: list[str]

    @property
    def name(self) -> str:
        """Returns the run as messages name it."""
        return f"{self.setting} seed {self.seed}"

    def report(self, split: str) -> Path:
        """Returns the file with the metrics of a split, which exists when the run is finished."""
        return self.workdir / "eval" / split / "metrics.json"

    def options(self) -> dict:
        """Returns the options that may change the result, by dotted key, as JSON gives them back."""
        flat = json.loads(json.dumps(configuration.flatten(self.config.to_dict())))
        ignored = tuple(key for key in IGNORED_KEYS if key != "train.seed")
        return {key: value for key, value in flat.items() if not key.startswith(ignored)}


def plan_runs(plan: Sweep) -> list[PlannedRun]:
    """Returns all runs of a sweep in order, those of other parts too."""
    runs, values = [], [dict(zip(plan.grid, row, strict=True)) for row in itertools.product(*plan.grid.values())]
    for model, grid, seed in itertools.product(plan.models, values, plan.seeds):
        arguments, setting = list_arguments(plan, model, seed, grid), name_setting(model, grid)
        chosen = [word.removeprefix("--config.").partition("=")[0] for word in arguments[1:]]
        workdir = plan.out / setting / str(seed)
        runs.append(PlannedRun(model, grid, seed, setting, workdir, arguments, load_config(arguments), chosen))
    return runs


def choose_part(runs: list[PlannedRun], part: tuple[int, int]) -> list[PlannedRun]:
    """Returns the runs of the k-th of n parts: every n-th run from the k-th on. Each run is in one part, and parts
    differ by at most one run."""
    k, n = part
    return runs[k - 1 :: n]


def list_arguments(plan: Sweep, model: str, seed: int, grid: dict[str, str]) -> list[str]:
    """Returns the flags of `train.py`, without `--workdir`, for a model, a seed and options of the grid."""
    return [
        f"--config={plan.config}{',' if ':' in plan.config else ':'}model={model}",
        f"--config.train.seed={seed}",
        *(f"--config.{key}={value}" for key, value in grid.items()),
        *plan.overrides,
    ]


def load_config(arguments: list[str]) -> ConfigDict | None:
    """Returns the configuration that the flags of `train.py` give; None if they cannot be read."""
    with contextlib.suppress(Exception):  # the file is Python, which can raise anything; the run will say what is wrong
        return parse_config(arguments)
    return None


def parse_config(arguments: list[str]) -> ConfigDict:
    """Returns the configuration that the flags of `train.py` give. Raises any error if they cannot be read."""
    values, argv = flags.FlagValues(), ["train.py", *arguments]
    config_flags.DEFINE_config_file("config", None, "", values, lock_config=True, sys_argv=argv)
    values(argv)
    return values.config


def name_setting(model: str, grid: dict[str, str]) -> str:
    """Returns the name of a model with options of the grid, which is that of its directory too. Characters that a file
    name should not have become `_`, and a digest of the value is appended."""
    return ",".join([model, *(f"{key}={_name_value(value)}" for key, value in grid.items())])


def _name_value(value: str) -> str:
    name = re.sub(r"[^\w.,+=()-]+", "_", value, flags=re.ASCII)
    return value if name == value else f"{name[-40:]}-{hashlib.sha256(value.encode()).hexdigest()[:6]}"


def parse_seeds(texts: list[str]) -> list[int]:
    """Parses the values of `--seeds`. Raises ConfigError if one is no number, or is there twice."""
    if not texts or not all(re.fullmatch("[0-9]{1,18}", text) for text in texts):
        raise ConfigError(f"--seeds={','.join(texts)}: give numbers separated by commas")
    seeds = list(map(int, texts))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds={','.join(texts)}: give every seed once")
    return seeds


def parse_part(text: str) -> tuple[int, int]:
    """Parses `--part=K/N`; an empty text is the whole sweep, (1, 1). Raises ConfigError."""
    if not text:
        return 1, 1
    match = re.fullmatch("([0-9]{1,5})/([0-9]{1,5})", text)
    k, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= k <= n <= MAX_PARTS:
        raise ConfigError(f"--part={text}: give K/N with K from 1 to N, such as 2/8 for the second of eight jobs")
    return k, n
