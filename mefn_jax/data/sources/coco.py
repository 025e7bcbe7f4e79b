"""COCO's own caption files, `captions_{train,val}*.json`, one a split (Chen et al. 2015)."""

from pathlib import Path

from mefn_jax.data.parsing import clean_caption, find_image, read_json, require
from mefn_jax.errors import DataError

COCO_SPLITS = ("train", "val", "test")


def read(path, images) -> tuple[dict[str, list[dict]], list[str]]:
    """Reads the folder `path` of annotation files; images lie below `images`, or in its `train2017/` and so on.

    Returns `(splits, notes)` as `karpathy.read` does: images by the file's order, captions by their ids. Raises
    DataError naming the entry that is wrong. Images without captions are counted in a note and left out.
    """
    root, folder = Path(path), Path(images)
    if not folder.is_dir():
        raise DataError(f"--images={images}: no such directory; give the folder of the images")
    splits, notes = {}, []
    for split in COCO_SPLITS:
        files = sorted(root.glob(f"captions_{split}*.json"))
        if len(files) > 1:
            raise DataError(f"{root}: {', '.join(f.name for f in files)}: keep one file a split")
        if files:
            splits[split], bare = _read_split(files[0], folder)
            if bare:
                notes.append(f"{files[0].name}: left out {bare} images without captions")
    if not splits:
        raise DataError(f"{root}: no captions_train*.json, captions_val*.json; --path takes the folder they lie in")
    return splits, notes


def _read_split(path: Path, folder: Path) -> tuple[list[dict], int]:
    document = read_json(path)
    # captions_train2017.json names images of train2017/.
    own = folder / path.stem.removeprefix("captions_")
    folder = own if own.is_dir() else folder
    captions: dict[int, dict[int, str]] = {}
    names = {}
    for k, entry in enumerate(require(document, "images", list, str(path))):
        where = f"{path}: images[{k}]"
        number = require(entry, "id", int, where)
        if number in names:
            raise DataError(f"{where}: the id {number} stands here a second time")
        names[number] = (require(entry, "file_name", str, where), where)
    for k, entry in enumerate(require(document, "annotations", list, str(path))):
        where = f"{path}: annotations[{k}]"
        image, number = require(entry, "image_id", int, where), require(entry, "id", int, where)
        if image not in names:
            raise DataError(f"{where}: image_id {image} is no id of `images`")
        if number in captions.setdefault(image, {}):
            raise DataError(f"{where}: the id {number} stands here a second time")
        captions[image][number] = clean_caption(require(entry, "caption", str, where), where)
    entries = [
        {
            "image": find_image(folder, name, where),
            "image_id": name,
            "captions": [captions[number][n] for n in sorted(captions[number])],
        }
        for number, (name, where) in names.items()
        if number in captions
    ]
    return entries, len(names) - len(entries)
