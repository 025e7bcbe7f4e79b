"""Finds the images below a folder, by name and by content, and says what is left out."""

import dataclasses
import os
from pathlib import Path

import numpy as np
from PIL import Image

from mefn_jax.errors import DataError
from mefn_jax.runtime.console import print0, printable

# Suffixes of files that are taken for images; if one cannot be decoded, it is listed.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".mpo", ".ppm", ".pgm", ".pnm"),
)
# Formats that other files are tried for: each begins with a signature, so that no other content is taken for them.
SNIFFED_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The images below a folder, in the order of their names.

    Attributes:
        folder: the folder.
        names: their paths below it, sorted.
        files: int64 `(I, 2)`, the size of each file in bytes, and the time of its last change in ns.
        other: files that are no images.
        unreadable: files and folders that cannot be read, and links to nothing.
        repeated: linked folders whose content is in the folder already, or that lead back to it.
    """

    folder: Path
    names: list[str]
    files: np.ndarray
    other: list[str]
    unreadable: list[str]
    repeated: list[str]

    def print_left_out(self) -> None:
        """Prints what is below the folder and not among the images, with examples."""
        kinds = {
            "files that are no images": self.other,
            "files or folders that cannot be read": self.unreadable,
            "links to folders whose images are taken already": self.repeated,
        }
        for kind, names in kinds.items():
            if names:
                examples = ", ".join(map(printable, names[:5])) + (", ..." if len(names) > 5 else "")
                print0(f"left out {len(names)} {kind}: {examples}")


def find_images(folder: Path, excluded: Path | None = None) -> ImageFolder:
    """Finds the images below a folder, also through links to files and folders; not below `excluded`.

    A file is an image if its suffix says so, or its content. Raises DataError if the folder does not exist or has no
    images.
    """
    if not folder.is_dir():
        raise DataError(f"--images={folder}: no such directory")
    found = {"images": {}, "other": [], "unreadable": [], "repeated": []}
    real_excluded = excluded and os.path.realpath(excluded)
    # A link to a folder above would bring in what lies beside the folder.
    visited = set(map(str, Path(os.path.realpath(folder)).parents))
    folders, links = [str(folder)], []
    while folders or links:
        path, is_link = (folders.pop(), False) if folders else (links.pop(0), True)
        real_path = os.path.realpath(path)
        if real_path in visited:
            found["repeated"] += [path] if is_link else []
            continue
        visited.add(real_path)
        if real_path != real_excluded:
            _sort_entries(path, found, folders, links)
    names = sorted((os.path.relpath(path, folder), path) for path in found["images"])
    if not names:
        raise DataError(f"--images={folder}: no images in it (looked at {len(found['other'])} files)")
    other, unreadable, repeated = (
        sorted(os.path.relpath(path, folder) for path in found[kind]) for kind in ("other", "unreadable", "repeated")
    )
    files = np.array([found["images"][path] for _, path in names], np.int64)
    return ImageFolder(folder, [name for name, _ in names], files, other, unreadable, repeated)


def _sort_entries(folder: str, found: dict, folders: list[str], links: list[str]) -> None:
    """Adds what is directly in a folder to `found`, to `folders`, or, for linked folders, to `links`."""
    try:
        with os.scandir(folder) as opened:
            entries = sorted(opened, key=lambda entry: entry.name)
    except OSError:
        found["unreadable"].append(folder)
        return
    for entry in entries:
        try:
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif not entry.is_file():
                found["unreadable"].append(entry.path)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) or _has_image_content(entry.path):
                status = entry.stat()
                found["images"][entry.path] = status.st_size, status.st_mtime_ns
            else:
                found["other"].append(entry.path)
        except OSError:
            found["unreadable"].append(entry.path)


def _has_image_content(path: str) -> bool:
    """Returns whether a file begins as an image of SNIFFED_FORMATS. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        try:
            Image.init()
            with Image.open(file, formats=[name for name in SNIFFED_FORMATS if name in Image.OPEN]):
                return True
        except Image.DecompressionBombError:
            return True  # listed later as one that cannot be decoded
        except Exception:  # content that is no image can raise any error of Pillow's readers
            return False
