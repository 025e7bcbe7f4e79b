"""Preprocessing of images in Hugging Face layout: `preprocessor_config.json`, `processor_config.json`.

Keys that the file leaves out are completed by the image processor's class in `transformers`. What the completed object
asks for becomes options of `config.image`, with which `data/images.py` gives the pixels of that class on Pillow, or it
is refused.
"""

import math
from pathlib import Path

from mefn_jax.config import MAX_IMAGE_SIZE
from mefn_jax.encoders.pretrained.files import (
    check_links,
    import_transformers,
    locate_file,
    read_object,
    read_section,
    to_one_line,
)
from mefn_jax.encoders.pretrained.open_clip import is_open_clip, read_image_settings
from mefn_jax.errors import WeightsError

PILLOW_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers of its filters
CONVNEXT = "ConvNextImageProcessor"  # ResNets come with it. It crops (`crop_pct`) below SQUASH_FROM pixels only
SQUASH_FROM = 384
# Classes that resize, crop, rescale and normalize by these keys and do nothing else.
PROCESSORS = (
    "ViTImageProcessor",
    "DeiTImageProcessor",
    "CLIPImageProcessor",
    "BitImageProcessor",
    "SiglipImageProcessor",
    "BlipImageProcessor",
    "DINOv3ViTImageProcessor",
    CONVNEXT,
)
# Classes that have no form on Pillow: one that has the same keys, and the defaults in which they differ. DINOv3's
# resizes after rescaling, which differs from resizing bytes by their rounding alone.
ON_PILLOW = {
    "DINOv3ViTImageProcessor": (
        "ViTImageProcessor",
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    ),
}
# Class of a file that names none, by `model_type` of config.json.
DEFAULT_PROCESSORS = {
    "vit": "ViTImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "dinov3_vit": "DINOv3ViTImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "resnet": CONVNEXT,
    "clip": "CLIPImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
}
SWITCH_SETTINGS = (
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_pad",
    "default_to_square",
    "use_square_size",
)
NUMBER_SETTINGS = ("rescale_factor", "crop_pct")
COLOR_SETTINGS = ("image_mean", "image_std")
SIZE_SETTINGS = ("size", "crop_size")
SIZE_KEYS = ("height", "width", "shortest_edge", "longest_edge")


def read_preprocessing(directory) -> dict:
    """Returns the options of `config.image` that the checkpoint determines: size, resize, crop, resample, mean and std.

    Without a file that describes the preprocessing, an empty dict. Raises WeightsError, naming file and key, for
    preprocessing that is not supported.
    """
    directory = Path(directory)
    check_links(directory)
    if is_open_clip(directory):
        path, settings = read_image_settings(directory)
        name = "CLIPImageProcessor"
    else:
        path, settings = _read_settings(directory)
        if settings is None:
            return {}
        name = _find_class(directory, path, settings)
    processor = _complete(path, name, settings)
    return _read_normalization(path, processor) | _read_resizing(path, processor, name)


def _read_settings(directory: Path) -> tuple[Path, dict | None]:
    """Returns the file and the object with the settings of images; None if there is none. As in `transformers`, the
    nested object of `processor_config.json` goes first."""
    joint, own = (locate_file(directory, f"{n}_config.json", str(directory)) for n in ("processor", "preprocessor"))
    if joint.is_file():
        settings = read_section(joint, read_object(joint), "image_processor")
        if settings is not None:
            return joint, settings
    return own, read_object(own) if own.is_file() else None


def _find_class(directory: Path, path: Path, settings: dict) -> str:
    """Returns the name of the image processor's class, in today's spelling."""
    config_path = directory / "config.json"
    config = read_object(config_path) if config_path.is_file() else {}
    named = settings.get("image_processor_type")
    if named is None and isinstance(settings.get("feature_extractor_type"), str):
        named = settings["feature_extractor_type"].replace("FeatureExtractor", "ImageProcessor")
    named = named or config.get("image_processor_type")
    if named is None:
        model_type = config.get("model_type")
        name = DEFAULT_PROCESSORS.get(model_type) if isinstance(model_type, str) else None
        if name is None:
            raise WeightsError(
                f"{path}: names no image_processor_type, and model_type {str(model_type)[:60]!r} in {config_path} has "
                f"no known one; add one of {', '.join(PROCESSORS)}"
            )
        return name
    name = str(named).removesuffix("Pil").removesuffix("Fast")
    if name not in PROCESSORS:
        raise WeightsError(
            f"{path}: image_processor_type {str(named)[:60]!r} is not supported, only {', '.join(PROCESSORS)}"
        )
    return name


def _complete(path: Path, name: str, settings: dict):
    """Returns the image processor of `transformers` with these settings. Raises WeightsError for a value of the wrong
    type."""
    known = (*SWITCH_SETTINGS, *NUMBER_SETTINGS, *COLOR_SETTINGS, *SIZE_SETTINGS, "resample")
    settings = {key: settings[key] for key in known if key in settings}  # null is kept: the class takes it for False
    for key, value in settings.items():
        if value is None:
            continue
        if key in SWITCH_SETTINGS and not isinstance(value, bool):
            raise WeightsError(f"{path}: {key} {str(value)[:60]} must be true or false")
        if key in NUMBER_SETTINGS and not (_is_number(value) and value > 0):
            raise WeightsError(f"{path}: {key} {str(value)[:60]} must be a number above 0")
        if key in COLOR_SETTINGS:
            _check_colors(path, key, value)
        if key in SIZE_SETTINGS:
            _check_size(path, key, value)
    pillow_name, defaults = ON_PILLOW.get(name, (name, {}))
    try:
        return getattr(import_transformers(), f"{pillow_name}Pil")(**defaults | settings)
    except Exception as e:  # the library raises errors of many classes
        raise WeightsError(f"{path}: {name} does not accept it ({to_one_line(e)})") from None


def _is_number(value) -> bool:
    """Returns True for a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_colors(path: Path, key: str, value) -> None:
    """Raises WeightsError if a mean or standard deviation of pixels is no number and no three numbers, or not
    possible."""
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3 or not all(map(_is_number, values)):
        raise WeightsError(f"{path}: {key} {str(value)[:60]} must be three numbers")
    if key == "image_std" and min(values) <= 0:
        raise WeightsError(f"{path}: {key} {str(value)[:60]} must be above 0")


def _check_size(path: Path, key: str, value) -> None:
    """Raises WeightsError if a size is not `224`, `[224, 224]`, `{"height": 224, "width": 224}` or
    `{"shortest_edge": 224}`, or if a side is no whole number in 1 to MAX_IMAGE_SIZE."""
    sides = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    unknown = [k for k in value if k not in SIZE_KEYS] if isinstance(value, dict) else []
    if unknown or not sides or (isinstance(value, list) and len(sides) != 2):
        raise WeightsError(f"{path}: {key} {str(value)[:60]} is not supported, only one or two sides ({SIZE_KEYS})")
    for side in sides:
        if type(side) is not int or not 1 <= side <= MAX_IMAGE_SIZE:
            raise WeightsError(
                f"{path}: {key} {str(value)[:60]} must be of whole numbers of pixels in 1 to {MAX_IMAGE_SIZE}"
            )


def _read_normalization(path: Path, processor) -> dict:
    """Returns mean and std of the pixels in [0, 1].

    `transformers` multiplies a pixel of [0, 255] by a factor f and then normalizes it: (f x - m) / s. This equals
    (x / 255 - m / (255 f)) / (s / (255 f)).
    """
    needed = (["rescale_factor"] if processor.do_rescale else []) + (
        list(COLOR_SETTINGS) if processor.do_normalize else []
    )
    for key in needed:
        if getattr(processor, key) is None:
            raise WeightsError(f"{path}: {key} must not be null")
    factor = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
    mean, std = (0.0, 1.0) if not processor.do_normalize else (processor.image_mean, processor.image_std)
    options = {}
    for name, value in (("mean", mean), ("std", std)):
        colors = value if isinstance(value, list | tuple) else [value] * 3
        options[name] = tuple(x if math.isclose(factor, 1.0) else x / factor for x in map(float, colors))
    if not all(map(math.isfinite, options["mean"])) or not all(0 < s < math.inf for s in options["std"]):
        raise WeightsError(f"{path}: rescale_factor {processor.rescale_factor} gives no finite pixels")
    return options


def _read_resizing(path: Path, processor, name: str) -> dict:
    """Returns size, resize, crop and resample."""
    resample = processor.resample
    if isinstance(resample, bool) or not isinstance(resample, int) or int(resample) not in PILLOW_RESAMPLE:
        raise WeightsError(f"{path}: resample {str(resample)[:60]} is not supported, only {PILLOW_RESAMPLE}")
    if not processor.do_resize:
        raise WeightsError(f"{path}: do_resize {processor.do_resize} is not supported; all images become one square")
    if processor.size is None:
        raise WeightsError(f"{path}: size must not be null")
    if processor.do_pad:
        raise WeightsError(f"{path}: do_pad true is not supported; all images are resized to one square")
    scaled, crop = (_plan_convnext if name == CONVNEXT else _plan_resize)(path, processor)
    return scaled | crop | {"resample": PILLOW_RESAMPLE[int(resample)]}


def _plan_convnext(path: Path, processor) -> tuple[dict, dict]:
    """Returns the options of ConvNeXt's processor, which crops what `crop_pct` leaves of small images only."""
    size = processor.size.shortest_edge
    if not size:
        raise WeightsError(f"{path}: size needs shortest_edge in {CONVNEXT}")
    if processor.do_center_crop and _read_crop(path, processor) != size:
        raise WeightsError(f"{path}: crop_size must equal size.shortest_edge {size} in {CONVNEXT}")
    if size >= SQUASH_FROM:
        return {"size": size}, {"resize": "squash", "crop": 1.0}
    if processor.crop_pct is None:
        raise WeightsError(f"{path}: crop_pct must not be null")
    shorter = int(size / processor.crop_pct)
    if not size <= shorter <= MAX_IMAGE_SIZE:
        raise WeightsError(f"{path}: crop_pct {processor.crop_pct} must be at most 1 and not tiny")
    return {"size": size}, {"resize": "crop", "crop": size / shorter}


def _plan_resize(path: Path, processor) -> tuple[dict, dict]:
    """Returns the options of a processor that resizes to `size` and then, if asked to, crops to `crop_size`."""
    size = processor.size
    if size.longest_edge:
        raise WeightsError(f"{path}: size.longest_edge is not supported; only squares are")
    if size.shortest_edge:
        if not processor.do_center_crop:
            raise WeightsError(
                f"{path}: size.shortest_edge without do_center_crop keeps each image's shape; only squares can be used"
            )
        scaled, mode = size.shortest_edge, "crop"
    elif size.height == size.width and size.height:
        scaled, mode = size.height, "squash"
    else:
        raise WeightsError(f"{path}: size {size.height} x {size.width} is not square; only squares are supported")
    crop = _read_crop(path, processor) if processor.do_center_crop else scaled
    if crop > scaled:
        raise WeightsError(f"{path}: crop_size {crop} is larger than size {scaled}, which is not supported")
    if mode == "squash" and crop < scaled:
        mode = "squash_crop"
    return {"size": crop}, {"resize": mode, "crop": crop / scaled}


def _read_crop(path: Path, processor) -> int:
    """Returns the side of the center crop. Raises WeightsError if it is no square."""
    crop = processor.crop_size
    if crop is None or not crop.height:
        raise WeightsError(f"{path}: do_center_crop needs a crop_size with height and width")
    if crop.height != crop.width:
        raise WeightsError(f"{path}: crop_size {crop.height} x {crop.width} is not square; only squares are supported")
    return crop.height
