"""Draws explanations: attention and entropy maps of captions of a split, or of any image and caption.

    python eval.py explain --workdir=DIR [--number=8] [--split=test] [--out=FOLDER] [--boxes=FILE.npy] [--photos=FOLDER]
    python eval.py explain --workdir=DIR --image=FILE --caption=TEXT [--out=FILE.png]

Only MEFN and its ablations have entropy maps; a system that compares pooled embeddings alone has nothing to draw
(docs/evaluation.md).
"""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image, ImageOps

from mefn_jax.data.images import to_rgb
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.captions import encode_captions, read_image_file
from mefn_jax.evaluation.gallery import open_split
from mefn_jax.evaluation.run import (
    Gallery,
    TrainedRun,
    define_gallery_flags,
    define_run_flags,
    gallery_from_flags,
    run_from_flags,
)
from mefn_jax.reports import explanation
from mefn_jax.reports.contact_sheet import is_own_picture
from mefn_jax.reports.explanation import Explanation
from mefn_jax.runtime.cli import define_count_flag, define_path_flag, define_process_flags, require_flag
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.multihost import check_on_first_process, initialize
from mefn_jax.runtime.outputs import check_output_directory, check_output_file
from mefn_jax.runtime.storage import resolve_directory, write_atomic

LARGEST_NUMBER = 100_000  # of pictures whose names are looked up before they are drawn
PHOTO_SUFFIXES = ("", ".jpg", ".jpeg", ".png")  # of a photograph's file name, after the image id


@dataclasses.dataclass(frozen=True)
class RegionSources:
    """Boxes and photographs of precomputed regions.

    Attributes:
        boxes: `(I, N, 4)`, x0, y0, x1, y1 as fractions of the image's width and height, for the images of a split in
            order; None if they are not given.
        photos: the folder of the photographs; None if it is not given.
    """

    boxes: np.ndarray | None
    photos: Path | None

    def attach(self, x: Explanation, image: int, name: str) -> Explanation:
        """Returns the explanation with the boxes and the photograph of an image, given by its position and its id.

        Raises DataError if there is no such photograph or if there are more or fewer boxes than regions.
        """
        boxes = x.boxes if self.boxes is None else self.boxes[image]
        if boxes is not None and len(boxes) != len(x.attention):
            raise DataError(f"--boxes: {len(boxes)} per image, but the model has {len(x.attention)} regions")
        if self.photos is None:
            return dataclasses.replace(x, boxes=boxes)
        return dataclasses.replace(x, boxes=boxes, photo=self._read_photo(name), photo_title="the photograph")

    def _read_photo(self, name: str) -> np.ndarray:
        for path in (self.photos / f"{name}{suffix}" for suffix in PHOTO_SUFFIXES):
            if path.is_file():
                try:
                    with Image.open(path) as image:
                        photo = to_rgb(ImageOps.exif_transpose(image))
                except OSError as e:
                    raise DataError(f"--photos: {path}: cannot be decoded ({e})") from None
                return np.asarray(ImageOps.contain(photo, (explanation.PHOTO_PIXELS,) * 2))
        raise DataError(f"--photos={self.photos}: no {name}, {name}.jpg or .png in it")


def draw_captions(
    run: TrainedRun, gallery: Gallery, number: int, out: str = "", boxes: str = "", photos: str = ""
) -> list[Path]:
    """Draws `number` evenly spaced captions of a split with their images, and returns the files.

    They go into the directory `out`, or `WORKDIR/eval/<split>/explain/`. `boxes` and `photos` name a .npy file and a
    folder for a model of precomputed regions (see `RegionSources`). Raises ConfigError for a matcher without
    attention.
    """
    if out:
        # Captions may be fewer than `number`, but no command writes more files than it has captions.
        names = [f"{k:02}.png" for k in range(1, min(number, LARGEST_NUMBER) + 1)]
        check_on_first_process(lambda: check_output_directory("--out", out, dict.fromkeys(names, is_own_picture)))
    evaluator, params, _ = run.load()
    explanation.check_can_explain(evaluator)
    if (boxes or photos) and evaluator.config.image.arch != "regions":
        raise ConfigError(
            "--boxes and --photos are for precomputed regions; this model takes images, which need neither"
        )
    _, split, is_own = open_split(evaluator, gallery)
    default = run.output_dir(gallery.split, data_dir="" if is_own else gallery.data_dir) / "explain"
    folder = resolve_directory("--out", out) if out else default
    region_sources = read_region_sources(boxes, photos, split.num_images)
    images, texts = evaluator.encode(params, split)
    captions = explanation.evenly_spaced(number, split.num_captions)
    explanations = explanation.explain_captions(evaluator, params, split, images, texts, captions, region_sources)
    return [save_explanation(x, folder / f"{k:02}.png") for k, x in enumerate(explanations, 1)]


def draw_image_file(run: TrainedRun, image: str, caption: str, out: str = "") -> Path:
    """Draws an image file with a caption, and returns the file: `out`, or one in `WORKDIR/eval/explain/`.

    With averaged parameters the directory is `WORKDIR/eval/explain_ema/`. Raises DataError if the image cannot be
    read, ConfigError for a caption without words, a model of precomputed regions, or a matcher without attention.
    """
    if out:
        check_on_first_process(lambda: check_output_file("--out", out, (".png",), is_own_picture))
    evaluator, params, _ = run.load()
    explanation.check_can_explain(evaluator)
    if evaluator.config.image.arch == "regions":
        raise ConfigError("--image: this model takes precomputed regions, not images")
    texts = encode_captions(evaluator, params, [caption], "--caption")
    path, data = Path(image), read_image_file(image)
    result = explanation.explain_image(evaluator, params, data, path.name, caption, texts)
    name = re.sub(r"[^\w.-]+", "_", path.stem) or "image"
    default = run.output_dir("explain") / f"{name}.png"
    return save_explanation(result, resolve_directory("--out", out) if out else default)


def read_region_sources(boxes: str, photos: str, images: int) -> RegionSources | None:
    """Reads the boxes and checks the folder that `--boxes` and `--photos` name; None if both are empty.

    `images`: the number of images of the split. Raises DataError if the boxes cannot be read or are wrong, ConfigError
    if the folder does not exist.
    """
    if not boxes and not photos:
        return None
    box_array = None
    if boxes:
        try:
            box_array = np.load(boxes, allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise DataError(f"--boxes={boxes}: cannot be read as an array ({e})") from None
        shape = getattr(box_array, "shape", "an archive")
        if not isinstance(box_array, np.ndarray) or len(shape) != 3 or shape[2] != 4 or len(box_array) != images:
            raise DataError(f"--boxes={boxes}: expected ({images}, regions, 4), found {shape}")
        in_image = np.all((box_array >= 0) & (box_array <= 1 + 1e-6))  # False for NaN
        if not in_image or not np.all(box_array[..., :2] < box_array[..., 2:]):
            raise DataError(
                f"--boxes={boxes}: give x0 < x1 and y0 < y1 as fractions of the image's width and height, from 0 to 1"
            )
    if photos and not Path(photos).is_dir():
        raise ConfigError(f"--photos={photos}: no such folder")
    return RegionSources(box_array, Path(photos) if photos else None)


def save_explanation(x: Explanation, path) -> Path:
    """Draws an explanation into a file, on process 0, and returns the path. Raises ConfigError if it cannot write."""
    if jax.process_index():
        return path
    from mefn_jax.reports import figures  # imports matplotlib, which only this needs

    try:
        write_atomic(path, figures.to_png(figures.draw_explanation(x)))
    except OSError as e:
        raise ConfigError(f"--out={path}: cannot be written ({e})") from None
    print0(f"wrote {path}: {x.values['score']:.3f}  {x.caption[:80]}")
    return path


def define_flags() -> None:
    """Defines the flags of the command."""
    define_run_flags()
    define_count_flag("number", 8, "Number of captions of the split to draw, evenly spaced.")
    define_gallery_flags(with_folds=False)
    define_path_flag("boxes", "", "Boxes of precomputed regions, a .npy file (images, regions, 4).")
    define_path_flag("photos", "", "Photographs of precomputed regions, a folder of files named by image id.")
    define_path_flag("image", None, "An image file to draw with --caption, in place of captions of the split.")
    flags.DEFINE_string("caption", None, "The caption to draw with --image.")
    define_path_flag(
        "out", "", "Folder of the pictures, or a .png file for --image; default: in WORKDIR/eval/<split>/explain."
    )
    define_process_flags()


def main() -> None:
    """Runs the command."""
    f = flags.FLAGS
    pair = None
    if f.image is not None or f.caption is not None:
        pair = require_flag("image"), require_flag("caption")
    initialize()
    if pair:
        draw_image_file(run_from_flags(), *pair, f.out)
    else:
        draw_captions(run_from_flags(), gallery_from_flags(), f.number, f.out, f.boxes, f.photos)
