"""Pictures of what the matcher makes of pairs, from the command line (`eval.py --explain`, DESIGN.md 4)."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps

from mefn_jax.config import require_local
from mefn_jax.data.images import to_rgb
from mefn_jax.data.split import SPLIT_ALIASES
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.captions import encode_captions
from mefn_jax.evaluation.evaluate import open_split, output_dir
from mefn_jax.evaluation.evaluator import load_checkpoint
from mefn_jax.reports import explanation
from mefn_jax.reports.explanation import Explanation
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.storage import resolve_directory, write_atomic

PHOTO_SUFFIXES = ("", ".jpg", ".jpeg", ".png")  # of a photograph's file, after the image's id


@dataclasses.dataclass(frozen=True)
class RegionSources:
    """Where precomputed regions come from: `boxes (I, N, 4)`, x0, y0, x1, y1 in image widths and heights, a split's
    images in order, and the folder of the photographs, None without one."""

    boxes: np.ndarray | None
    photos: Path | None

    def attach(self, x: Explanation, image: int, name: str) -> Explanation:
        """The explanation with its photograph and boxes. Raises DataError where they are not there."""
        boxes = x.boxes if self.boxes is None else self.boxes[image]
        if boxes is not None and len(boxes) != len(x.region_weights):
            raise DataError(f"--boxes: {len(boxes)} an image, but the model has {len(x.region_weights)} regions")
        if self.photos is None:
            return dataclasses.replace(x, boxes=boxes)
        return dataclasses.replace(x, boxes=boxes, photo=self._photo(name), photo_title="the photograph")

    def _photo(self, name: str) -> np.ndarray:
        for path in (self.photos / f"{name}{suffix}" for suffix in PHOTO_SUFFIXES):
            if path.is_file():
                try:
                    with Image.open(path) as image:
                        whole = to_rgb(ImageOps.exif_transpose(image))
                except OSError as e:
                    raise DataError(f"--photos: {path}: cannot be decoded ({e})") from None
                return np.asarray(ImageOps.contain(whole, (explanation.PHOTO,) * 2))
        raise DataError(f"--photos={self.photos}: no {name}, {name}.jpg or .png in it")


def draw_captions(
    workdir, data_dir: str, split: str, step: str, number: int, out="", ema=False, boxes="", photos=""
) -> list[Path]:
    """Draws `number` captions of a split with their images, spread evenly over it (`explanation.spread`), into `out`
    or `WORKDIR/eval/<split>/explain/`. Returns the files. `boxes` and `photos` name a .npy file and a folder (see
    `Places`) for a model of precomputed regions."""
    workdir = resolve_directory("--workdir", workdir)
    out = resolve_directory("--out", out) if out else output_dir(workdir, split, ema=ema) / "explain"
    require_local("--data_dir", data_dir)
    evaluator, params, _ = load_checkpoint(workdir, step, ema)
    explanation.check_can_explain(evaluator)
    if (boxes or photos) and evaluator.config.image.arch != "regions":
        raise ConfigError("--boxes and --photos are for precomputed regions; this model takes images, and knows both")
    _, opened_split = open_split(evaluator, data_dir, SPLIT_ALIASES.get(split, split))
    places = read_region_sources(boxes, photos, opened_split.num_images)
    images, texts = evaluator.encode(params, opened_split)
    chosen = explanation.evenly_spaced(number, opened_split.num_captions)
    found = explanation.explain_captions(evaluator, params, opened_split, images, texts, chosen, places)
    return [save_explanation(x, out / f"{k:02}.png") for k, x in enumerate(found, 1)]


def draw_image_file(workdir, step: str, file: str, caption: str, out="", ema=False) -> Path:
    """Draws an image file and a caption, into `out` or `WORKDIR/eval/explain/`. Returns the file."""
    workdir = resolve_directory("--workdir", workdir)
    if out and not out.lower().endswith(".png"):
        raise ConfigError(f"--out={out}: give a .png file")
    evaluator, params, _ = load_checkpoint(workdir, step, ema)
    explanation.check_can_explain(evaluator)
    if evaluator.config.image.arch == "regions":
        raise ConfigError("--explain_image: this model takes precomputed regions, not images")
    texts = encode_captions(evaluator, params, [caption], "--explain_caption")
    path = Path(file)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(f"--explain_image={file}: {e.strerror}") from None
    found = explanation.explain_image(evaluator, params, data, path.name, caption, texts)
    name = re.sub(r"[^\w.-]+", "_", path.stem) or "image"
    return save_explanation(
        found, resolve_directory("--out", out) if out else workdir / "eval" / ("explain" + "_ema" * ema) / f"{name}.png"
    )


def read_region_sources(boxes: str, photos: str, images: int) -> RegionSources | None:
    """What `--boxes` and `--photos` name. Raises DataError, ConfigError."""
    if not boxes and not photos:
        return None
    found = None
    if boxes:
        try:
            found = np.load(boxes, allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise DataError(f"--boxes={boxes}: cannot be read as an array ({e})") from None
        shape = getattr(found, "shape", "an archive")
        if not isinstance(found, np.ndarray) or len(shape) != 3 or shape[2] != 4 or len(found) != images:
            raise DataError(f"--boxes={boxes}: expected ({images}, regions, 4), found {shape}")
        inside = np.all((found >= 0) & (found <= 1 + 1e-6))  # not of NaN
        if not inside or not np.all(found[..., :2] < found[..., 2:]):
            raise DataError(f"--boxes={boxes}: give x0 < x1 and y0 < y1 in image widths and heights, from 0 to 1")
    if photos and not Path(photos).is_dir():
        raise ConfigError(f"--photos={photos}: no such folder")
    return RegionSources(found, Path(photos) if photos else None)


def save_explanation(x: Explanation, path) -> Path:
    """Draws one, on process 0, and says where it is."""
    if jax.process_index():
        return path
    from mefn_jax.reports import figures  # matplotlib, which only this needs

    try:
        write_atomic(path, figures.to_png(figures.draw_explanation(x)))
    except OSError as e:
        raise ConfigError(f"--out={path}: cannot be written ({e})") from None
    print0(f"wrote {path}: {x.values['score']:.3f}  {x.caption[:80]}")
    return path
