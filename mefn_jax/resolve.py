"""Checks of a configuration before any work begins, in the one module that sees the names of all parts."""

from ml_collections import ConfigDict

from mefn_jax.config import check_config, require_local
from mefn_jax.losses import LOSS_CHOICES
from mefn_jax.model import MODEL_CHOICES


def check_options(config: ConfigDict) -> ConfigDict:
    """Returns the configuration unchanged. Raises ConfigError, naming the option, for a value that cannot work."""
    check_config(config, MODEL_CHOICES | LOSS_CHOICES)
    return config


def validate(config: ConfigDict) -> ConfigDict:
    """Returns the configuration of a command that reads data, unchanged. Raises ConfigError as `check_options` does,
    and if `data.dir` is a URL."""
    check_options(config)
    require_local("data.dir", config.data.dir)
    return config
