"""Reader of Flickr8k as distributed: `Images/` (or `Flicker8k_Dataset/`), `Flickr8k.token.txt`, and split lists.

A line of the token file is `<file>.jpg#<number>\\t<caption>`, and a line of a split list is a file name (docs/data.md,
Flickr8k).
"""

import re
from pathlib import Path

from mefn_jax.data.parsing import ImageFiles, read_text
from mefn_jax.errors import DataError

TOKEN_FILE = "Flickr8k.token.txt"
IMAGE_FOLDERS = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset")
LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
LINE = re.compile(r"(?P<name>[^\t#]+)#(?P<number>[0-9]{1,9})\t(?P<caption>.*)")


def read(path) -> tuple[dict[str, list[dict]], list[str]]:
    """Reads the split lists and captions in the folder `path`. Images are not opened.

    Returns `(splits, notes)`: for each split list that exists, in its order, entries `{image: Path, image_id: str,
    captions: [str]}`; and lines to show the user (skipped captions). Raises DataError that names the file and the line
    for a malformed token line, an empty caption, a listed image without a file or captions, or an image listed twice.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; --path takes the folder that holds {TOKEN_FILE}")
    images = next((root / f for f in IMAGE_FOLDERS if (root / f).is_dir()), None)
    if images is None:
        raise DataError(f"{root}: no image folder; expected one of {', '.join(IMAGE_FOLDERS)}")
    lists = {split: root / name for split, name in LISTS.items() if (root / name).is_file()}
    if not lists:
        raise DataError(f"{root}: no split list; expected at least one of {', '.join(LISTS.values())}")
    names = _read_lists(lists)
    captions, num_skipped = _read_tokens(root / TOKEN_FILE, listed={n for split in names.values() for n in split})
    image_files = ImageFiles()
    splits = {
        split: [
            _make_entry(name, f"{lists[split]}:{number}", image_files, images, captions)
            for number, name in enumerate(listed, 1)
        ]
        for split, listed in names.items()
    }
    notes = [f"{TOKEN_FILE}: skipped {num_skipped} captions whose image is in no split list"] if num_skipped else []
    return splits, notes


def _read_lists(lists: dict[str, Path]) -> dict[str, list[str]]:
    """Returns the image names of each split. Raises DataError for an image that is listed twice."""
    names, seen = {}, {}
    for split, path in lists.items():
        names[split] = [line.strip() for line in _read_lines(path) if line.strip()]
        for name in names[split]:
            if name in seen:
                raise DataError(f"{path}: image {name!r} is already listed in {seen[name].name}; list it once")
            seen[name] = path
    return names


def _read_tokens(path: Path, listed: set[str]) -> tuple[dict[str, list[str]], int]:
    """Returns the captions of each listed image in the order of their numbers, and the number of well-formed lines
    whose image is not listed."""
    numbered: dict[str, dict[int, str]] = {}
    num_skipped = 0
    for line_number, line in enumerate(_read_lines(path), 1):
        match = LINE.fullmatch(line)
        if match is None:
            raise DataError(
                f"{path}:{line_number}: not '<image>#<number><tab><caption>': {line[:80]!r}; correct the line"
            )
        name, caption = match["name"], match["caption"].strip()
        if name not in listed:
            num_skipped += 1
            continue
        if not caption:
            raise DataError(f"{path}:{line_number}: empty caption of {name!r}; write one or remove the line")
        captions = numbered.setdefault(name, {})
        if int(match["number"]) in captions:
            raise DataError(f"{path}:{line_number}: caption {name}#{match['number']} occurs a second time; remove one")
        captions[int(match["number"])] = caption
    return {name: [captions[k] for k in sorted(captions)] for name, captions in numbered.items()}, num_skipped


def _read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file."""
    text = read_text(path)
    return text.removesuffix("\n").split("\n") if text else []


def _make_entry(name: str, where: str, image_files: ImageFiles, images: Path, captions: dict[str, list[str]]) -> dict:
    """Returns the entry of an image, which is listed at the place `where`."""
    # A name must not lead out of the image folder.
    if name != Path(name).name or name in (".", ".."):
        raise DataError(f"{where}: {name!r} is not a plain file name")
    image = image_files.find(images, name, where)
    if name not in captions:
        raise DataError(f"{where}: image {name!r} has no caption in {TOKEN_FILE}; take it off the list")
    return {"image": image, "image_id": name, "captions": captions[name]}
