"""Reader of Karpathy's split files, `dataset_{flickr8k,flickr30k,coco}.json`, with a folder of images."""

from pathlib import Path

from mefn_jax.data.parsing import ImageFiles, clean_caption, read_json, require
from mefn_jax.errors import DataError

KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read(path, images) -> tuple[dict[str, list[dict]], list[str]]:
    """Reads the JSON file `path`. An entry's image is its `filename`, or its `filepath/filename`, below the folder
    `images`.

    Returns `(splits, notes)`: `splits` maps the name of a split to its entries `{image: Path, image_id: str,
    captions: [str]}`, in the order of the file; `notes` are lines to print. `restval` is training data. Raises
    DataError that names the malformed entry, or one whose image another entry has.
    """
    path, folder = Path(path), Path(images)
    if not folder.is_dir():
        raise DataError(f"--images={images}: no such directory; give the folder of the images")
    splits, num_restval, image_files = {}, 0, ImageFiles()
    for k, entry in enumerate(require(read_json(path), "images", list, str(path))):
        where = f"{path}: images[{k}]"
        split = require(entry, "split", str, where)
        if split not in KARPATHY_SPLITS:
            raise DataError(f"{where}: split {split!r} is none of {', '.join(KARPATHY_SPLITS)}")
        num_restval += split == "restval"
        splits.setdefault(KARPATHY_SPLITS[split], []).append(_convert_entry(entry, image_files, folder, where))
    if not splits:
        raise DataError(f"{path}: no images")
    return splits, [f"{path.name}: {num_restval} images of restval are training data"] if num_restval else []


def _convert_entry(entry: dict, image_files: ImageFiles, folder: Path, where: str) -> dict:
    """Converts an entry of the file to one of ours."""
    name = require(entry, "filename", str, where)
    if "filepath" in entry:
        name = f"{require(entry, 'filepath', str, where)}/{name}"
    sentences = require(entry, "sentences", list, where)
    if not sentences:
        raise DataError(f"{where}: no sentences; remove the entry")
    captions = []
    for n, sentence in enumerate(sentences):
        sentence_place = f"{where}.sentences[{n}]"
        captions.append(clean_caption(require(sentence, "raw", str, sentence_place), sentence_place))
    return {"image": image_files.find(folder, name, where), "image_id": name, "captions": captions}
