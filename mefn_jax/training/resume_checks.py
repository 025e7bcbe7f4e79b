"""Checks that a run goes on as it began: the same model, data, negatives and frozen parameters."""

import jax

from mefn_jax import config as configuration
from mefn_jax import optim
from mefn_jax.data.digests import find_changes
from mefn_jax.errors import CheckpointError
from mefn_jax.runtime.console import print0


def check_resumes(config, saved_config: dict, workdir) -> None:
    """Prints the options that have changed since the checkpoint of a run that resumes, whose configuration is
    `saved_config`. Raises CheckpointError, naming the options, if they change the model or the loss: what determines
    the shapes of the state."""
    changed = configuration.diff_configs(saved_config, config.to_dict())
    fixed = {k: v for k, v in changed.items() if not {k, k.split(".")[0]}.isdisjoint(configuration.FIXED_KEYS)}
    if fixed:
        of_both = {k: v for k, v in fixed.items() if None not in v} or fixed  # without options of one system alone
        differences = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in of_both.items())
        raise CheckpointError(
            f"{workdir} holds a run with another model or loss ({differences}); choose another --workdir"
        )
    for key, (old, new) in changed.items():
        print0(f"note: {key} was {old!r} in this workdir and is now {new!r}")
    if bool(config.train.ema_decay) != bool(saved_config["train"]["ema_decay"]):
        raise CheckpointError(
            f"{workdir}: train.ema_decay cannot be switched on or off in a run; choose another --workdir"
        )


def check_same_data(saved: dict | None, digests: dict, data_dir: str, workdir) -> None:
    """Raises CheckpointError if a run resumes on other data than it was started with, even at the same path. `saved`
    are the digests that the checkpoint keeps, None if it keeps none."""
    if changes := find_changes(saved, digests):
        raise CheckpointError(
            f"{workdir} holds a run on other data: {' and '.join(changes)} of data.dir={data_dir or '(drawn scenes)'} "
            "have changed; restore the data set, or choose another --workdir"
        )


def check_same_negatives(saved_meta: dict, path: str, digest: str | None, workdir) -> None:
    """Raises CheckpointError if a run resumes with a file of hard negatives whose content has changed. Resuming with
    another file is a change of an option, which is listed. `path`: data.negatives; `digest`: the file's SHA-256."""
    saved = saved_meta["negatives"]
    if saved and path == saved_meta["config"]["data"]["negatives"] and saved != digest:
        raise CheckpointError(
            f"{workdir} holds a run with another content of data.negatives={path}; restore the file, or give the new "
            "file another name"
        )


def check_frozen(lr_multipliers, shapes, saved, workdir) -> None:
    """Raises CheckpointError if other parameters are frozen now than in the run so far: the optimizer has no state for
    frozen parameters. `saved` is the section `train` of the checkpoint's configuration."""
    saved_multipliers = optim.lr_multipliers(shapes, saved.lr_multipliers, saved.layer_decay)
    if jax.tree.map(bool, saved_multipliers) != jax.tree.map(bool, lr_multipliers):
        raise CheckpointError(
            f"{workdir}: train.lr_multipliers freezes other parameters than this run started with "
            f"({tuple(saved.lr_multipliers)}); keep them, or choose another --workdir"
        )
