"""Models on the Hugging Face hub: their names, and the download of the files that are read, which are data."""

import re
from pathlib import Path

from mefn_jax.errors import CheckpointError
from mefn_jax.evaluation.exported import MODEL_FILES
from mefn_jax.runtime.console import print0

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_name(workdir) -> bool:
    """Returns whether a text names a model on the hub: OWNER/NAME, unless there is a directory OWNER here: then NAME is
    a path in it, perhaps one that is missing by mistake. A `Path` is always a path."""
    if not isinstance(workdir, str) or not HUB_NAME.fullmatch(workdir):
        return False
    try:
        return not Path(workdir).parent.exists()
    except OSError:  # a name that the file system cannot hold
        return False


def download_model(name: str) -> str:
    """Returns the folder of a model on the hub, from the local cache or downloaded: the files that are read, no others.
    Raises CheckpointError if it is not available."""
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        folder = snapshot_download(name, allow_patterns=list(MODEL_FILES))
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"{name}: no such directory, and not available from the Hugging Face hub ({type(e).__name__}); give the "
            "directory of a training run or of an exported model, or OWNER/NAME of a model on the hub"
        ) from None
    print0(f"{name}: the model of this name on the Hugging Face hub, revision {Path(folder).name}")
    return folder
