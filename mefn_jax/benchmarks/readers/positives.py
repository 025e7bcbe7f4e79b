"""Reader of the positives of ECCV Caption (Chun et al. 2022) and CxC (Parekh et al. 2021), from the package
`eccv_caption`.

`{name}_image_to_caption.json` and `{name}_caption_to_image.json` are objects from the COCO id of a query to the list of
the ids of all that is relevant for it, and `coco_test_ids.npy` has the ids of the captions in the order of Karpathy's
split.
"""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np

from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import read_json
from mefn_jax.errors import DataError

PACKAGE = "eccv_caption"
ORDER_FILE = "coco_test_ids.npy"
DIRECTIONS_OF_FILES = {"i2t": "image_to_caption", "t2i": "caption_to_image"}


@dataclasses.dataclass(frozen=True)
class PositiveIds:
    """Positives by COCO's ids.

    Attributes:
        i2t: for the id of an image, the ids of the captions that are true of it.
        t2i: for the id of a caption, the ids of the images that it is true of.
        order: int64 `(C,)`, the ids of all captions of the gallery in the published order.
    """

    i2t: dict[int, list[int]]
    t2i: dict[int, list[int]]
    order: np.ndarray


def find_positives_folder(request: Request, name: str) -> Path:
    """Returns the folder with the positives `name`: `--data_dir` if they are there, else the package's. Raises
    DataError that says how to install the package."""
    if (request.folder / f"{name}_{DIRECTIONS_OF_FILES['i2t']}.json").is_file():
        return request.folder
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise DataError(
            f"{request.benchmark}: the package {PACKAGE} has the positives and is not installed: "
            f"pip install {PACKAGE}; {request.published}"
        )
    return Path(package.submodule_search_locations[0]) / "data"


def read_positives(request: Request, name: str) -> PositiveIds:
    """Reads the positives `name`, "eccv" or "cxc". Raises DataError if a file is missing or malformed."""
    folder = find_positives_folder(request, name)
    sides = {side: _read_side(folder / f"{name}_{direction}.json") for side, direction in DIRECTIONS_OF_FILES.items()}
    path = folder / ORDER_FILE
    try:
        order = np.load(path, allow_pickle=False)
    except Exception as e:  # a damaged header can raise any error
        raise DataError(f"{path}: cannot be read ({e}); install {PACKAGE} again") from None
    if order.ndim != 1 or order.dtype.kind not in "iu" or len(np.unique(order)) < len(order) or not len(order):
        raise DataError(f"{path}: expected the ids of captions, each once; install {PACKAGE} again")
    return PositiveIds(**sides, order=order.astype(np.int64))


def _read_side(path: Path) -> dict[int, list[int]]:
    """Reads the positives of one direction. Raises DataError that names the malformed entry."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: expected an object of ids; install {PACKAGE} again")
    result = {}
    for key, ids in content.items():
        if not key.isdecimal() or not isinstance(ids, list) or not ids or not all(type(x) is int for x in ids):
            raise DataError(f"{path}: {key!r}: expected an id and a list of ids; install {PACKAGE} again")
        result[int(key)] = list(dict.fromkeys(ids))
    return result
