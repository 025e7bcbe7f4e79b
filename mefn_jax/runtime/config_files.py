"""The configuration files that the package brings: found by name, in a checkout and in an installed package."""

import os
from pathlib import Path

from mefn_jax.config import suggest
from mefn_jax.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
NO_CONFIGS = ("__init__", "towers")  # modules of that folder that are no configurations


def find_config_folder() -> Path:
    """Returns the folder of the configuration files: `configs/` of a checkout, or `mefn_jax/configs/` as a wheel has it
    (pyproject.toml puts the one there under the name of the other)."""
    return _PACKAGE / "configs" if is_installed() else _PACKAGE.parent / "configs"


def is_installed() -> bool:
    """Returns whether this is an installed package, which has the configuration files in it, and no checkout."""
    return (_PACKAGE / "configs" / "default.py").is_file()


def list_configs() -> list[str]:
    """Returns the names of the configuration files."""
    return sorted(path.stem for path in find_config_folder().glob("*.py") if path.stem not in NO_CONFIGS)


def find_config(value: str) -> str:
    """Returns the value of `--config` with the name of a configuration replaced by the path of its file: in a checkout,
    `shapes:smoke` becomes `configs/shapes.py:smoke`. A path, which ends in `.py` or has a `/`, is returned as it is.

    Raises ConfigError, listing the names, for a name or a path that no file has.
    """
    name, colon, argument = value.partition(":")
    is_path, names = "/" in name or name.endswith(".py"), list_configs()
    path = Path(name) if is_path else find_config_folder() / f"{name}.py"
    if not path.is_file() or not (is_path or name in names):
        raise ConfigError(
            f"--config={name}: no such {'file' if is_path else 'configuration'}{suggest(name, names)}; give the path "
            f"of a file, or one of {', '.join(names)}"
        )
    if is_path:
        return value
    below = os.path.relpath(path)
    return f"{path if below.startswith(os.pardir) else below}{colon}{argument}"
