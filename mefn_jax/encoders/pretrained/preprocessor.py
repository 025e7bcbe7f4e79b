"""What a checkpoint in Hugging Face layout says of its images: `preprocessor_config.json`, `processor_config.json`."""

from pathlib import Path

from mefn_jax.encoders.pretrained.weights import read_object
from mefn_jax.errors import WeightsError

PILLOW_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
SQUASH = {"resize": "squash", "crop": 1.0}


def preprocessing(directory) -> dict:
    """The options of `config.image` that it determines: size, resize, crop, resample, mean and std, as far as it says
    them; empty without a file. Raises WeightsError, naming the key, for what cannot be done here."""
    path, found = _find(Path(directory))
    try:
        return _normalising(path, found) | _resizing(path, found)
    except (TypeError, ValueError, KeyError, IndexError) as e:
        raise WeightsError(f"{path}: makes no sense ({e!r})") from None


def _find(directory: Path) -> tuple[Path, dict]:
    own, joint = directory / "preprocessor_config.json", directory / "processor_config.json"
    if own.is_file():
        return own, read_object(own)
    if joint.is_file():  # of a CLIP, newer versions write tokenizer and images into one
        return joint, read_object(joint).get("image_processor", {})
    return own, {}


def _normalising(path: Path, found: dict) -> dict:
    if abs(found.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9 or not found.get("do_rescale", True):
        raise WeightsError(f"{path}: pixels are not scaled to [0, 1] (rescale_factor, do_rescale), which is not built")
    if not found.get("do_normalize", True):
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    values = {ours: found.get(f"image_{ours}") for ours in ("mean", "std")}
    if any(v is not None and (not isinstance(v, list) or len(v) != 3) for v in values.values()):
        raise WeightsError(f"{path}: image_mean and image_std must be three numbers")
    return {ours: tuple(map(float, v)) for ours, v in values.items() if v is not None}


def _resizing(path: Path, found: dict) -> dict:
    wanted = {}
    if found.get("resample") is not None:
        if found["resample"] not in PILLOW_RESAMPLE:
            raise WeightsError(f"{path}: resample {found['resample']} is none of {PILLOW_RESAMPLE}")
        wanted["resample"] = PILLOW_RESAMPLE[found["resample"]]
    size, crop = (_side(found.get(key), key, path) for key in ("size", "crop_size"))
    if size and found.get("crop_pct"):  # ConvNeXt's processor, which ResNets come with: it squashes from 384 pixels on
        share = float(found["crop_pct"])
        return wanted | {"size": size} | ({"resize": "crop", "crop": share} if size < 384 else SQUASH)
    if crop and found.get("do_center_crop", True):
        if size and crop > size:
            raise WeightsError(f"{path}: crop_size {crop} is more than size {size}, which is not built")
        return wanted | {"size": crop, "resize": "crop", "crop": crop / size if size else 1.0}
    return wanted | ({"size": size} | SQUASH if size else {})


def _side(size, key: str, path: Path) -> int | None:
    """`224`, `[224, 224]`, `{"shortest_edge": 224}` or `{"height": 224, "width": 224}` as a number; None for none."""
    if isinstance(size, dict):
        size = [size["shortest_edge"]] if "shortest_edge" in size else [size["height"], size["width"]]
    sides = {*size} if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise WeightsError(f"{path}: {key} {size}: only squares are built")
    return sides.pop()
