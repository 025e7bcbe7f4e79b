"""Reader of COCO's own caption files, `captions_{train,val,test}*.json`, one for each split (Chen et al. 2015)."""

from pathlib import Path

from mefn_jax.data.parsing import ImageFiles, clean_caption, read_json, require
from mefn_jax.errors import DataError

COCO_SPLITS = ("train", "val", "test")


def read(path, images) -> tuple[dict[str, list[dict]], list[str]]:
    """Reads the folder `path` of annotation files; images lie in `images`, or in its folders `train2017/` and so on.

    Returns `(splits, notes)` as `karpathy.read` does: images in the order of the file, captions in the order of their
    ids. Images without captions are left out and counted in a note. Raises DataError that names the malformed entry,
    or one whose image another entry has.
    """
    root, folder = Path(path), Path(images)
    if not folder.is_dir():
        raise DataError(f"--images={images}: no such directory; give the folder of the images")
    splits, notes, image_files = {}, [], ImageFiles()
    for split in COCO_SPLITS:
        files = sorted(root.glob(f"captions_{split}*.json"))
        if len(files) > 1:
            raise DataError(f"{root}: {', '.join(f.name for f in files)}: keep one file for each split")
        if files:
            splits[split], num_left_out = _read_split(files[0], image_files, folder)
            if num_left_out:
                notes.append(f"{files[0].name}: left out {num_left_out} images without captions")
    if not splits:
        raise DataError(
            f"{root}: no captions_train*.json or captions_val*.json; --path takes the folder that holds them"
        )
    return splits, notes


def _read_split(path: Path, image_files: ImageFiles, folder: Path) -> tuple[list[dict], int]:
    """Returns the entries of a split, and the number of images without captions."""
    document = read_json(path)
    # captions_train2017.json names images in train2017/.
    split_folder = folder / path.stem.removeprefix("captions_")
    folder = split_folder if split_folder.is_dir() else folder
    captions: dict[int, dict[int, str]] = {}
    names = {}
    for k, entry in enumerate(require(document, "images", list, str(path))):
        where = f"{path}: images[{k}]"
        image_id = require(entry, "id", int, where)
        if image_id in names:
            raise DataError(f"{where}: the id {image_id} occurs a second time; give each image its own id")
        names[image_id] = (require(entry, "file_name", str, where), where)
    for k, entry in enumerate(require(document, "annotations", list, str(path))):
        where = f"{path}: annotations[{k}]"
        image_id, caption_id = require(entry, "image_id", int, where), require(entry, "id", int, where)
        if image_id not in names:
            raise DataError(f"{where}: image_id {image_id} is not an id in `images`; correct it or remove the entry")
        if caption_id in captions.setdefault(image_id, {}):
            raise DataError(f"{where}: the id {caption_id} occurs a second time; give each caption its own id")
        captions[image_id][caption_id] = clean_caption(require(entry, "caption", str, where), where)
    entries = [
        {
            "image": image_files.find(folder, name, where),
            "image_id": name,
            "captions": [captions[image_id][n] for n in sorted(captions[image_id])],
        }
        for image_id, (name, where) in names.items()
        if image_id in captions
    ]
    return entries, len(names) - len(entries)
