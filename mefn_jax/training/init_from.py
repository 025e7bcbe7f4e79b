"""Begins a run from the parameters of another one, or of an exported model (`train.init_from`)."""

import dataclasses
import functools
import re

import jax
import numpy as np
from ml_collections import ConfigDict

from mefn_jax.config import diff_configs
from mefn_jax.errors import CheckpointError, ConfigError
from mefn_jax.evaluation.exported import compare_leaves, list_problems, name_variables
from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.runtime.console import print0

# Sections and options whose values are compared with those of the run that gave the parameters.
COMPARED_KEYS = ("model", "embed_dim", "image", "text", "matcher", "loss")


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained model whose parameters another run begins with.

    Attributes:
        name: `train.init_from`, the run or the exported model.
        config: its configuration.
        tokenizer_json: the text of its `tokenizer.json`.
        variables: its parameters and constants, NumPy arrays; LoRA's adapters are merged.
        may_differ: regular expression of `train.init_new`; None: all parameters are taken.
    """

    name: str
    config: ConfigDict
    tokenizer_json: str
    variables: dict
    may_differ: re.Pattern | None

    @functools.cached_property
    def leaves(self) -> dict[str, np.ndarray]:
        """Returns its variables by path."""
        return name_variables(self.variables)

    def is_new(self, path: str) -> bool:
        """Returns whether the run has its own value at a path: of an adapter, and where `train.init_new` matches."""
        path = path.removeprefix("constants/")
        return path.startswith("lora/") or (self.may_differ is not None and bool(self.may_differ.search(path)))

    def insert(self, variables: dict) -> dict:
        """Returns the variables of a new run with those of this model in their places, except for new ones. Raises
        CheckpointError that names all that are missing here, surplus, or of another shape or type."""
        own, leaves = (
            {path: (str(x.dtype), x.shape) for path, x in values.items() if not self.is_new(path)}
            for values in (name_variables(variables), self.leaves)
        )
        if problems := compare_leaves(own, leaves):
            raise CheckpointError(
                f"train.init_from={self.name}: its parameters are not those of this configuration: "
                f"{list_problems(problems)}; give the configuration of that run, or name what is drawn anew with "
                "train.init_new, such as --config.train.init_new='^(loss|matcher)/'"
            )

        def choose(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return self.leaves[name] if name in own else leaf

        return jax.tree_util.tree_map_with_path(choose, variables)

    def takes_all(self, variables: dict) -> bool:
        """Returns whether all variables of a run come from this model, except for adapters."""
        return not any(self.is_new(path) for path in name_variables(variables) if not path.startswith("lora/"))


def load_source(config: ConfigDict) -> Source | None:
    """Loads the model that `train.init_from` names, the best checkpoint of a run; None without one. All processes call
    this together. Raises ConfigError if other options contradict it, CheckpointError if it cannot be read."""
    options = config.train
    pattern = compile_new(options.init_new)
    if not options.init_from:
        if pattern:
            raise ConfigError("train.init_new needs train.init_from, the run whose other parameters are taken")
        return None
    evaluator, variables, step = TrainedRun(options.init_from).load()
    check_towers(config, evaluator.config)
    print0(f"train.init_from={options.init_from}: begins with the parameters of step {step}")
    return Source(options.init_from, evaluator.config, evaluator.tokenizer.json, jax.device_get(variables), pattern)


def compile_new(text: str) -> re.Pattern | None:
    """Returns the regular expression of `train.init_new`; None if it is empty. Raises ConfigError if it is
    malformed."""
    try:
        return re.compile(text) if text else None
    except re.error as e:
        raise ConfigError(f"train.init_new: {text!r} is no regular expression ({e})") from None


def check_towers(config: ConfigDict, source: ConfigDict) -> None:
    """Raises ConfigError if a configuration names another pretrained tower than the run that it begins from: only one
    of the two can give the parameters."""
    for kind in ("image", "text"):
        name = config[kind].pretrained
        if name and name != source[kind].pretrained:
            raise ConfigError(
                f"{kind}.pretrained={name}: train.init_from={config.train.init_from} gives this tower "
                f"({source[kind].pretrained or 'not pretrained'}); leave {kind}.pretrained out"
            )


def note_differences(config: ConfigDict, source: Source) -> None:
    """Prints a note for each option of the model and the loss that differs from that of the run whose parameters are
    taken, if both systems have it. Raises ConfigError for another normalization of captions than its tokenizer was
    trained with."""
    for key in ("lower_case", "punctuation"):
        if config.text[key] != source.config.text[key]:
            raise ConfigError(
                f"text.{key}={config.text[key]!r}, but {source.config.text[key]!r} in train.init_from={source.name}, "
                f"whose tokenizer is used; set --config.text.{key}={source.config.text[key]}"
            )
    for key, (old, new) in diff_configs(source.config.to_dict(), config.to_dict()).items():
        is_of_both = None not in (old, new)  # no option of one system alone
        if is_of_both and not {key, key.split(".")[0]}.isdisjoint(COMPARED_KEYS):
            print0(f"note: {key} is {old!r} in {source.name} and {new!r} here")
