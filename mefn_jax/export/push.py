"""Uploads an exported folder to the Hugging Face hub."""

from pathlib import Path

from ml_collections import ConfigDict

from mefn_jax.config import get_dotted
from mefn_jax.data.mixture import parse_mixture
from mefn_jax.errors import ConfigError, reason
from mefn_jax.evaluation.exported import read_metadata
from mefn_jax.evaluation.hub import HUB_NAME
from mefn_jax.export.folder import FOLDER_FILES
from mefn_jax.runtime.cli import PATH_OPTIONS
from mefn_jax.runtime.console import print0


def check_push(name: str) -> None:
    """Raises ConfigError unless a name is OWNER/NAME."""
    if not HUB_NAME.fullmatch(name):
        raise ConfigError(f"--push={name}: give OWNER/NAME of a model on the Hugging Face hub")


def push_folder(folder: Path, name: str, is_private: bool) -> str:
    """Uploads the files of an exported folder, no others, as the model `name`, which is created if it does not exist.
    Returns its address. Raises ConfigError if the hub refuses; the folder is complete then."""
    from huggingface_hub import HfApi  # slow to import, and rarely needed

    note_paths(folder)
    api = HfApi()
    try:
        api.create_repo(name, repo_type="model", private=is_private, exist_ok=True)
        patterns = sorted(FOLDER_FILES)
        address = api.upload_folder(repo_id=name, folder_path=folder, repo_type="model", allow_patterns=patterns)
    except Exception as e:  # of the network, of the hub, of rights: errors of many classes
        raise ConfigError(
            f"--push={name}: the hub refuses ({reason(e)}); log in with `hf auth login`. {folder} is complete: "
            f"hf upload {name} {folder}"
        ) from None
    print0(f"pushed {folder} to {name}: {address}")
    return str(address)


def note_paths(folder: Path) -> None:
    """Prints a note for each absolute path of this machine that the configuration of an exported model names."""
    config = ConfigDict(read_metadata(folder)["checkpoint"]["config"])
    for key in PATH_OPTIONS:
        path = get_dotted(config, key)
        parts = [part for part, _ in parse_mixture(path)] if key == "data.dir" else [path]
        if any(Path(part).is_absolute() for part in parts):
            print0(f"note: config.json, which is uploaded, names {key}={path}")
