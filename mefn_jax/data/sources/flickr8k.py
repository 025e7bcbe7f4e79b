"""Flickr8k as it is distributed: `Images/` (or `Flicker8k_Dataset/`), `Flickr8k.token.txt`, and split lists.

PEERS.md 1 has the format: a token line is `<file>.jpg#<k>\\t<caption>`, a split list one file name a line.
"""

import re
from pathlib import Path

from mefn_jax.data.parsing import find_image, read_text
from mefn_jax.errors import DataError

TOKEN_FILE = "Flickr8k.token.txt"
IMAGE_FOLDERS = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset")
LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
LINE = re.compile(r"(?P<name>[^\t#]+)#(?P<number>\d+)\t(?P<caption>.*)")


def read(path) -> tuple[dict[str, list[dict]], list[str]]:
    """Reads the lists and captions below the folder `path`; images are named, not opened.

    Returns `(splits, notes)`: for each split list present, in the list's order, `{image: Path, image_id: str,
    captions: [str]}`; and lines to show the user (what was skipped). Raises DataError, naming the file and the line,
    for a malformed token line, an empty caption, a listed image without a file or captions, an image listed twice.
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
    captions, stray = _read_tokens(root / TOKEN_FILE, listed={n for split in names.values() for n in split})
    splits = {
        split: [_entry(name, number, lists[split], images, captions) for number, name in enumerate(listed, 1)]
        for split, listed in names.items()
    }
    notes = [f"{TOKEN_FILE}: skipped {stray} captions whose image is in no split list"] if stray else []
    return splits, notes


def _read_lists(lists: dict[str, Path]) -> dict[str, list[str]]:
    names, seen = {}, {}
    for split, path in lists.items():
        names[split] = [line.strip() for line in _lines(path) if line.strip()]
        for name in names[split]:
            if name in seen:
                raise DataError(f"{path}: image {name!r} is listed already, in {seen[name].name}; list it once")
            seen[name] = path
    return names


def _read_tokens(path: Path, listed: set[str]) -> tuple[dict[str, list[str]], int]:
    """Captions by image in the order of their numbers, and how many well-formed lines named no listed image."""
    numbered: dict[str, dict[int, str]] = {}
    stray = 0
    for number, line in enumerate(_lines(path), 1):
        match = LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{path}:{number}: not '<image>#<number><tab><caption>': {line[:80]!r}; correct the line")
        name, caption = match["name"], match["caption"].strip()
        if name not in listed:
            stray += 1
            continue
        if not caption:
            raise DataError(f"{path}:{number}: empty caption of {name!r}; write one or remove the line")
        of_image = numbered.setdefault(name, {})
        if int(match["number"]) in of_image:
            raise DataError(f"{path}:{number}: caption {name}#{match['number']} stands here a second time; remove one")
        of_image[int(match["number"])] = caption
    return {name: [of[k] for k in sorted(of)] for name, of in numbered.items()}, stray


def _lines(path: Path) -> list[str]:
    text = read_text(path)
    return text.removesuffix("\n").split("\n") if text else []


def _entry(name: str, number: int, listing: Path, images: Path, captions: dict[str, list[str]]) -> dict:
    # A name must not lead out of the image folder.
    if name != Path(name).name or name in (".", ".."):
        raise DataError(f"{listing}:{number}: {name!r} is not a plain file name")
    image = find_image(images, name, f"{listing}:{number}")
    if name not in captions:
        raise DataError(f"{listing}:{number}: image {name!r} has no caption in {TOKEN_FILE}; take it off the list")
    return {"image": image, "image_id": name, "captions": captions[name]}
