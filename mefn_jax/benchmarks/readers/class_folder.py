"""Reader of a folder of images by class: `<class>/<image>` for each class, as in ImageNet's val split, Food-101 and
many others.

`classes.json`, an object from the name of a folder to the name of its class, may be beside the folders (ImageNet's are
numbers such as n01440764); without it, a folder's name is that of its class, with underscores read as spaces.
"""

from pathlib import Path

import numpy as np

from mefn_jax.benchmarks.items import ClassFolder, ImagePool
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import clean_caption, find_repeated, read_json, read_text, require
from mefn_jax.errors import DataError

CLASSES_FILE = "classes.json"
DEFAULT_TEMPLATES = ("a photo of a {}.",)
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def read(request: Request) -> ClassFolder:
    """Reads the images of every class. Raises DataError for a class without images or name, for two classes of one name
    and for a template without {}."""
    root = request.folder
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) < 2:
        raise DataError(
            f"{root}: {len(folders)} folders in it; give a folder with one for each class; {request.published}"
        )
    names = _read_names(root, [path.name for path in folders])
    if (repeated := find_repeated(names)) is not None:
        raise DataError(f"{root}: two classes are called {repeated!r}; give them other names in {CLASSES_FILE}")
    images, label = ImagePool(), []
    for k, folder in enumerate(folders):
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())
        if not files:
            raise DataError(f"{folder}: no images in it; remove the folder, or add images")
        for path in files:
            images.add(path, str(path.relative_to(root)))
            label.append(k)
    return ClassFolder(images.to_split(request.benchmark), np.array(label), names, read_templates(request.templates))


def _read_names(root: Path, folders: list[str]) -> list[str]:
    """Returns the names of the classes of folders."""
    path = root / CLASSES_FILE
    if not path.is_file():
        return [clean_caption(name.replace("_", " "), f"{root}/{name}") for name in folders]
    content = read_json(path)
    return [clean_caption(require(content, name, str, str(path)), f"{path}: {name}") for name in folders]


def read_templates(path: str) -> list[str]:
    """Returns the templates of a file, one a line, or the one built in if the path is empty.

    Raises DataError for a line without {}.
    """
    if not path:
        return list(DEFAULT_TEMPLATES)
    templates = [line.strip() for line in read_text(Path(path)).splitlines() if line.strip()]
    wrong = [line for line in templates if line.count("{}") != 1]
    if wrong or not templates:
        found = f"{wrong[0]!r}" if wrong else "no line"
        raise DataError(f"--templates={path}: {found}; write lines with one {{}} in place of the class name")
    return templates
