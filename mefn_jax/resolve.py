"""Makes a configuration complete before any work begins: checked, fitted to the data, with the sizes of pretrained
towers or of a checkpoint filled in."""

import dataclasses

from ml_collections import ConfigDict

from mefn_jax.config import check_config, flatten, get_dotted, list_unknown, require_local, suggest
from mefn_jax.configs import default
from mefn_jax.data.from_config import fill_data_widths
from mefn_jax.encoders.pretrained.towers import keep_saved_options, load_pretrained
from mefn_jax.encoders.pretrained.weights import Tower
from mefn_jax.errors import ConfigError
from mefn_jax.losses import LOSS_CHOICES, LOSSES, check_loss
from mefn_jax.matching.systems import find_system
from mefn_jax.model import MODEL_CHOICES
from mefn_jax.runtime.console import print0


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A complete configuration.

    Attributes:
        config: the configuration, locked.
        towers: pretrained towers by kind, "image" and "text"; none for a run that resumes.
        tokenizer_json: content of the text tower's `tokenizer.json`; None without such a tower.
    """

    config: ConfigDict
    towers: dict[str, Tower]
    tokenizer_json: str | None


def resolve(config: ConfigDict, splits=(), saved: ConfigDict | None = None) -> Resolved:
    """Returns a configuration complete: its values are checked, the widths of the `splits`' regions and cached text are
    filled in, and the sizes, preprocessing and tokenizer of its pretrained towers, or those of the checkpoint whose
    configuration is `saved`. Raises ConfigError or WeightsError."""
    check_options(config)
    note_contradictions(config)
    for split in splits:
        config = fill_data_widths(config, split)
    if saved is not None:
        return Resolved(keep_saved_options(config, saved), {}, None)
    return Resolved(*load_pretrained(config))


def check_options(config: ConfigDict) -> ConfigDict:
    """Returns the configuration unchanged. Raises ConfigError, naming the option, for a value that cannot work."""
    check_names(config)
    check_config(config, MODEL_CHOICES | LOSS_CHOICES)
    check_loss(config.loss)
    check_loss_needs(config)
    return config


def check_names(config: ConfigDict) -> None:
    """Raises ConfigError, naming the first, for an option that does not exist: a configuration file may set any."""
    known = default.base(config.model).to_dict()
    for key in list_unknown(config.to_dict(), known):
        near = suggest(key, flatten(known))
        raise ConfigError(
            f"{key} is no option of model={config.model}{near}; correct it in the configuration file, or remove it"
        )


def check_loss_needs(config: ConfigDict) -> None:
    """Raises ConfigError, naming the options, if a loss needs averaged parameters that a run does not keep, or fused
    pairs that its matcher does not have."""
    name = config.loss.name
    needs = LOSSES[name].needs
    if "teacher_scores" in needs and not config.train.ema_decay:
        raise ConfigError(
            f"train.ema_decay=0: loss.name={name} learns from the averaged parameters; set it to 0.995, or choose a "
            "loss.name without distill"
        )
    if "fused_similarity" in needs and not find_system(config.model).matcher.defines("fused_similarity"):
        raise ConfigError(
            f"loss.name={name} fuses pairs, and the matcher of model={config.model} does not; choose another "
            "loss.name, or model=mate"
        )


def note_contradictions(config: ConfigDict) -> None:
    """Prints a note for each option that the system requires and that the command line contradicts."""
    for key, value in find_system(config.model).requires.items():
        chosen = get_dotted(config, key)
        if chosen != value:
            print0(f"note: model={config.model} is defined by {key}={value}, but {key}={chosen} is used")


def validate(config: ConfigDict) -> ConfigDict:
    """Returns the configuration of a command that reads data, unchanged. Raises ConfigError as `check_options` does,
    and if `data.dir` is a URL."""
    check_options(config)
    require_local("data.dir", config.data.dir)
    return config
