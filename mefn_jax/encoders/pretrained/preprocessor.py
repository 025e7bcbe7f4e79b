"""Preprocessing of images in Hugging Face layout: `preprocessor_config.json`, `processor_config.json`."""

from pathlib import Path

from mefn_jax.encoders.pretrained.weights import read_object
from mefn_jax.errors import WeightsError

PILLOW_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers of its filters
SQUASH = {"resize": "squash", "crop": 1.0}


def read_preprocessing(directory) -> dict:
    """Returns the options of `config.image` that the checkpoint determines.

    These are size, resize, crop, resample, mean and std, as far as the file has them; without a file, an empty dict.
    Raises WeightsError, naming the key, for preprocessing that is not supported.
    """
    path, settings = _read_settings(Path(directory))
    try:
        return _read_normalization(path, settings) | _read_resizing(path, settings)
    except (TypeError, ValueError, KeyError, IndexError) as e:
        raise WeightsError(
            f"{path}: cannot be interpreted ({e!r}); copy it again from the checkpoint's source"
        ) from None


def _read_settings(directory: Path) -> tuple[Path, dict]:
    """Returns the file and the object with the settings of images; an empty object without a file."""
    own, joint = directory / "preprocessor_config.json", directory / "processor_config.json"
    if own.is_file():
        return own, read_object(own)
    if joint.is_file():  # newer versions write the settings of CLIP's tokenizer and images into one file
        return joint, read_object(joint).get("image_processor", {})
    return own, {}


def _read_normalization(path: Path, settings: dict) -> dict:
    """Returns mean and std."""
    if abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9 or not settings.get("do_rescale", True):
        raise WeightsError(
            f"{path}: pixels are not scaled to [0, 1] (rescale_factor, do_rescale), which is not supported"
        )
    if not settings.get("do_normalize", True):
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    values = {ours: settings.get(f"image_{ours}") for ours in ("mean", "std")}
    if any(v is not None and (not isinstance(v, list) or len(v) != 3) for v in values.values()):
        raise WeightsError(f"{path}: image_mean and image_std must be three numbers")
    return {ours: tuple(map(float, v)) for ours, v in values.items() if v is not None}


def _read_resizing(path: Path, settings: dict) -> dict:
    """Returns size, resize, crop and resample."""
    options = {}
    if settings.get("resample") is not None:
        if settings["resample"] not in PILLOW_RESAMPLE:
            raise WeightsError(f"{path}: resample {settings['resample']} is not supported, only {PILLOW_RESAMPLE}")
        options["resample"] = PILLOW_RESAMPLE[settings["resample"]]
    size, crop = (_read_side(settings.get(key), key, path) for key in ("size", "crop_size"))
    if size and settings.get("crop_pct"):  # ResNets come with ConvNeXt's processor, which squashes from 384 pixels on
        share = float(settings["crop_pct"])
        return options | {"size": size} | ({"resize": "crop", "crop": share} if size < 384 else SQUASH)
    if crop and settings.get("do_center_crop", True):
        if size and crop > size:
            raise WeightsError(f"{path}: crop_size {crop} is larger than size {size}, which is not supported")
        return options | {"size": crop, "resize": "crop", "crop": crop / size if size else 1.0}
    return options | ({"size": size} | SQUASH if size else {})


def _read_side(size, key: str, path: Path) -> int | None:
    """Returns a size as a number, None for None. Raises WeightsError if it is no square.

    `size` is `224`, `[224, 224]`, `{"shortest_edge": 224}` or `{"height": 224, "width": 224}`.
    """
    if isinstance(size, dict):
        size = [size["shortest_edge"]] if "shortest_edge" in size else [size["height"], size["width"]]
    sides = {*size} if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise WeightsError(f"{path}: {key} {size} is not square; only squares are supported")
    return sides.pop()
