"""Configuration: parses the arguments of `get_config`, and checks options with errors that name them."""

import difflib
import math

from ml_collections import ConfigDict

from mefn_jax.errors import ConfigError

BASE_CHOICES = {
    "text.punctuation": ("keep", "drop"),
    "train.dtype": ("float32", "bfloat16"),
    "train.init": ("random", "cca"),
    "image.resnet.norm": ("group", "batch"),
    "image.vit.pool": ("mean", "class", "pooler", "attention"),
}
JOINT_SYSTEMS = ("clip", "siglip")  # `embed_dim` of these is the width of a pretrained pair's joint space
DEFAULT_SIZE = 224  # side of images in pixels, if neither the configuration nor a checkpoint gives one
MAX_IMAGE_SIZE = 4096  # largest side of the square input in pixels; beyond, no tower's activations fit into memory
BLOCK_SIZES = ("width", "layers", "heads", "mlp_width")  # of a Transformer
TRANSFORMERS = ("bert", "clip", "siglip")  # text towers
POSITIVE = (
    "embed_dim",
    *(f"image.resnet.{name}" for name in ("stem_width", "depths", "widths")),
    *(f"image.vit.{name}" for name in (*BLOCK_SIZES, "eps", "patch", "stem", "position_grid")),
    *(f"text.{tower}.{name}" for tower in TRANSFORMERS for name in (*BLOCK_SIZES, "eps", "max_positions")),
    *("text.gru.word_width", "text.gru.layers"),
    "text.max_tokens",
    "train.batch_size",
    "train.learning_rate",
    "train.clip_norm",
    "train.lora.alpha",
    "train.grad_cache_chunks",
    "train.score_chunk_mib",
    "train.score_tile_mib",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "data.threads",
    "data.views",
    "data.negatives_per_pair",
    "eval.batch_size",
    "matcher.init_lambda",
    "matcher.init_hub_scale",
    "matcher.inverse_temperature",
    "matcher.lse_factor",
    "matcher.steps",
    "matcher.groups",
    "matcher.kernels",
    "matcher.init_eta",
    "matcher.concepts",
    "matcher.neighbours",
    "matcher.edges",
    "matcher.init_gamma",
    "matcher.init_share",
    "matcher.layers",
    "matcher.mlp_width",
)
# Options that are lists, with the type of their values.
LIST_TYPES = {
    "data.scenes": int,
    "image.region_grids": int,
    "image.resnet.depths": int,
    "image.resnet.widths": int,
    "image.vit.stem": int,
    "image.vit.position_grid": int,
    "train.lr_multipliers": str,
    "matcher.kernels": float,
}
SETS = ("matcher.levels", "matcher.cues")  # options that are a set of names
# Options in [0, 1): probabilities, fractions and decays.
PROBABILITIES = (
    "image.resnet.stochastic_depth",
    "image.vit.dropout",
    "image.vit.stochastic_depth",
    "text.bert.dropout",
    "text.bert.stochastic_depth",
    "text.clip.dropout",
    "text.clip.stochastic_depth",
    "text.siglip.dropout",
    "text.siglip.stochastic_depth",
    "text.gru.dropout",
    "image.regions.channel_dropout",
    "text.channel_dropout",
    "train.warmup_fraction",
    "train.ema_decay",
    "augment.color_jitter",
    "augment.word_noise",
    "augment.region_dropout",
    "matcher.init_share",
    "matcher.share",
)
NOT_NEGATIVE = (
    "image.size",
    "image.regions.width",
    "image.regions.grid",
    "image.vit.registers",
    "image.vit.rotation_base",
    "text.bert.type_vocab_size",
    "text.bert.distance_buckets",
    "text.siglip.pad_id",
    "text.siglip.head_width",
    "text.cached.width",
    "text.vocab_size",
    "data.scene_seed",
    "data.held_out_images",
    "matcher.hub_vectors",
    "train.lora.rank",
    "matcher.init_kappa",
    "matcher.init_evidence_weight",
    "matcher.init_evidence_lambda",
    "train.steps",
    "train.epochs",
    "train.patience",
    "train.seed",
    "train.weight_decay",
    "data.workers",
    "eval.val_images",
    "eval.score_tile_mib",
    "eval.explained_pairs",
    "loss.margin",
    "loss.triplet_weight",
)
# Options that change pixels, with the value that turns each off.
PIXEL_AUGMENTATIONS = {
    "augment.crop": 1.0,
    "augment.flip": 0.0,
    "augment.color_jitter": 0.0,
}
# Sections and options that determine the shape and meaning of the state. A run resumes only if they are unchanged.
LORA_KEYS = ("train.lora.rank", "train.lora.alpha", "train.lora.matrices")
FIXED_KEYS = ("model", "embed_dim", "image", "text", "matcher", "loss.name", *LORA_KEYS)
LARGEST_INT = 2**31 - 1  # of int32
LARGEST_FLOAT = 3.4e38  # of float32
LARGEST_SEED = 2**62 - 1  # seeds are doubled and become keys of 64 bits (`mefn_jax/data/pipeline.py`)


def parse_arg(arg: str | None, **options):
    """Parses "a=x,b" into a dict of the given options (name=default). A bare name means True.

    Raises ConfigError for an unknown name, with the closest known one, and for a missing or superfluous value.
    """
    values = dict(options)
    for argument in filter(None, (arg or "").split(",")):
        name, has_value, value = argument.partition("=")
        if name not in options:
            raise ConfigError(
                f"unknown configuration argument {name!r}{suggest(name, options)}; known are {_join_names(options)}"
            )
        if isinstance(options[name], bool):
            if has_value:
                raise ConfigError(f"configuration argument {name!r} takes no value: write ...:{name}")
            values[name] = True
        elif not has_value or not value:
            raise ConfigError(f"configuration argument {name!r} needs a value: write ...:{name}={options[name]}")
        else:
            values[name] = value
    return values


def suggest(name: str, names) -> str:
    """Returns ", did you mean 'x'?" with the closest of `names`, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def check_config(config: ConfigDict, choices: dict) -> None:
    """Raises ConfigError, naming the option, for values that cannot work. `choices` maps options to the names that the
    model and the loss know."""
    options = flatten(config.to_dict())  # a matcher's options are those of its class
    for key, names in (BASE_CHOICES | choices).items():
        for value in _list_values(options, key):
            if value not in names:
                raise ConfigError(f"{key}: {value!r} is not one of {_join_names(names)}{suggest(str(value), names)}")
    _check_lists(options)
    for key in SETS:
        values = _list_values(options, key)
        if len(set(values)) < len(values):
            raise ConfigError(f"{key}: {tuple(values)} names one twice")
    if options.get("matcher.levels") == []:
        raise ConfigError("matcher.levels: () must name at least one level")
    _check_sizes(options)
    for key in POSITIVE:
        for value in _list_values(options, key):
            if not value > 0:
                raise ConfigError(f"{key}: {value!r} must be greater than 0")
    for key in NOT_NEGATIVE:
        if key in options and options[key] < 0:
            raise ConfigError(f"{key}: {options[key]!r} must not be negative")
    if len(config.data.scenes) != 3 or min(config.data.scenes) < 1:
        raise ConfigError(f"data.scenes: {tuple(config.data.scenes)} must be three numbers: train, val, test")
    if config.data.held_out_images and not config.data.dir:
        raise ConfigError(
            "data.held_out_images: the drawn scenes have a val split of their own; give data.dir, or leave it 0"
        )
    batch_size, views = config.train.batch_size, config.data.views
    if batch_size % views:
        raise ConfigError(
            f"train.batch_size={batch_size} is not a multiple of data.views={views}, the rows of a pair; choose one "
            "that is"
        )
    _check_negatives(config)
    if (config.train.steps > 0) == (config.train.epochs > 0):
        raise ConfigError(
            f"train.steps={config.train.steps} and train.epochs={config.train.epochs}: set exactly one, the other to 0"
        )
    for key in PROBABILITIES:
        if key in options and not 0 <= get_dotted(config, key) < 1:
            raise ConfigError(f"{key}: {get_dotted(config, key)!r} must be in [0, 1)")
    for key in ("image.crop", "augment.crop", "train.layer_decay"):
        if not 0 < get_dotted(config, key) <= 1:
            raise ConfigError(f"{key}: {get_dotted(config, key)!r} must be in (0, 1]")
    if config.image.size > MAX_IMAGE_SIZE:
        raise ConfigError(f"image.size: {config.image.size} must be at most {MAX_IMAGE_SIZE}")
    _check_colors("image.mean", config.image.mean, -math.inf)
    _check_colors("image.std", config.image.std, 0.0)
    if not 0 <= config.augment.flip <= 1:
        raise ConfigError(f"augment.flip: {config.augment.flip!r} must be in [0, 1]")
    for kind, check_tower in (("image", check_image_tower), ("text", check_text_tower)):
        has_no_tower = config[kind].arch in ("regions", "cached")
        if has_no_tower or not config[kind].pretrained:  # otherwise the sizes come from the checkpoint
            check_tower(config)


def _check_negatives(config: ConfigDict) -> None:
    """Raises ConfigError if pairs cannot stand in groups of mined negatives."""
    if not config.data.negatives:
        return
    if config.data.pair_twins:
        raise ConfigError(
            "data.negatives and data.pair_twins both choose the pairs that share a batch; set "
            "--config.data.pair_twins=False"
        )
    size, pairs = 1 + config.data.negatives_per_pair, count_pairs(config)
    if pairs % size:
        raise ConfigError(
            f"data.negatives_per_pair={size - 1}: groups of {size} pairs do not divide the {pairs} pairs of a batch; "
            "choose another train.batch_size"
        )


def count_pairs(config: ConfigDict) -> int:
    """Returns the number of pairs in a batch: its rows, divided by the views of each pair."""
    return config.train.batch_size // config.data.views


def _list_values(options: dict, key: str) -> list:
    """Returns the values of an option, one unless it is a list; none for an option that this configuration lacks."""
    value = options.get(key, [])
    return value if isinstance(value, list) else [value]


def _check_colors(key: str, values, above: float) -> None:
    """Raises ConfigError if the values of an option are not three finite numbers above a bound, one for each channel of
    the pixels."""
    values = tuple(values) if isinstance(values, list | tuple) else (values,)
    are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    if len(values) != 3 or not are_numbers:
        raise ConfigError(f"{key}: {values} must be three numbers, one for each channel")
    if min(values) <= above:
        raise ConfigError(f"{key}: {values} must be above {above:g}")


def _check_lists(options: dict) -> None:
    """Raises ConfigError, naming the option, for a value of a list that has another type than the option's."""
    words = {int: "a whole number", float: "a number", str: "a text"}
    for key, kind in LIST_TYPES.items():
        for value in _list_values(options, key):
            if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
                raise ConfigError(f"{key}: {value!r} must be {words[kind]}")


def _check_sizes(options: dict) -> None:
    """Raises ConfigError, naming the option, for numbers that a compiled program or a random generator cannot take."""
    for key, value in options.items():
        for number in value if isinstance(value, list) else [value]:
            limit = LARGEST_SEED if key.endswith("seed") else LARGEST_INT
            if isinstance(number, int) and abs(number) > limit:
                raise ConfigError(f"{key}: {number} is too large; the largest number is {limit}")
            may_be_infinite = key.endswith("_mib") and number == math.inf
            if isinstance(number, float) and not abs(number) <= LARGEST_FLOAT and not may_be_infinite:
                raise ConfigError(f"{key}: {number} is not a number of at most {LARGEST_FLOAT:g}")


def check_image_tower(config: ConfigDict) -> None:
    """Raises ConfigError if the sizes of the image tower do not fit the input size or the region grids."""
    image_config = config.image
    if image_config.arch == "regions":
        if image_config.pretrained:
            raise ConfigError(
                f"image.pretrained={image_config.pretrained} is an image tower, but image.arch=regions has none"
            )
        changed = [key for key, off_value in PIXEL_AUGMENTATIONS.items() if get_dotted(config, key) != off_value]
        if changed:
            raise ConfigError(
                f"{changed[0]}={get_dotted(config, changed[0])} changes pixels, but image.arch=regions has none"
            )
        return
    size = image_config.size or DEFAULT_SIZE
    if not image_config.region_grids or min(image_config.region_grids) < 1:
        raise ConfigError(
            f"image.region_grids: {tuple(image_config.region_grids)} must be numbers above 0, one for each grid"
        )
    if image_config.arch == "resnet" and len(image_config.region_grids) > len(image_config.resnet.depths):
        raise ConfigError(
            f"image.region_grids: {len(image_config.region_grids)} grids, but the ResNet has "
            f"{len(image_config.resnet.depths)} stages"
        )
    depths, widths = image_config.resnet.depths, image_config.resnet.widths
    if image_config.arch == "resnet" and len(depths) != len(widths):
        raise ConfigError(
            f"image.resnet.depths={tuple(depths)} and image.resnet.widths={tuple(widths)}: give one number for each "
            "stage in both"
        )
    if image_config.arch == "vit":
        if len(image_config.vit.position_grid) not in (0, 2):
            raise ConfigError(
                f"image.vit.position_grid: {tuple(image_config.vit.position_grid)} must be two numbers, rows and "
                "columns, or ()"
            )
        _check_heads("image.vit", image_config.vit)
        if image_config.vit.patch < 1 or image_config.vit.patch % 2 ** len(image_config.vit.stem):
            raise ConfigError(
                f"image.vit.patch={image_config.vit.patch} is not a multiple of {2 ** len(image_config.vit.stem)}, "
                "the stem's stride"
            )
        head_width = image_config.vit.width // image_config.vit.heads
        if image_config.vit.rotation_base and head_width % 4:
            raise ConfigError(
                f"image.vit.rotation_base rotates four channels at a time, and a head has {head_width}; change "
                "image.vit.heads, or set it to 0"
            )
        if size % image_config.vit.patch:
            raise ConfigError(f"image.size={size} is not a multiple of image.vit.patch={image_config.vit.patch}")


def check_text_tower(config: ConfigDict) -> None:
    """Raises ConfigError if the sizes of the text tower do not fit the length of the captions."""
    arch, max_tokens = config.text.arch, config.text.max_tokens
    if arch == "cached":
        if config.text.pretrained:
            raise ConfigError(f"text.pretrained={config.text.pretrained} is a text tower; set text.arch=bert to run it")
        if config.augment.word_noise:
            raise ConfigError("augment.word_noise changes tokens, but text.arch=cached has none; set it to 0")
        return
    if arch == "gru" and config.text.channel_dropout:
        raise ConfigError("text.channel_dropout precedes a projection, and text.arch=gru has none; set it to 0")
    if arch not in TRANSFORMERS:  # a GRU reads captions of any length
        return
    tower = config.text[arch]
    _check_heads(f"text.{arch}", tower)
    # The first position of a token that is not padding.
    first = tower.pad_id + 1 if arch == "bert" else 0
    length = max_tokens + 1 + config.text.start_token + first
    if length > tower.max_positions:
        around = "[CLS] and [SEP]" if config.text.start_token else "the end token"
        raise ConfigError(
            f"text.max_tokens={max_tokens} with {around} exceeds text.{arch}.max_positions={tower.max_positions}"
        )


def _check_heads(section: str, tower: ConfigDict) -> None:
    """Raises ConfigError if the width of a Transformer is not a multiple of its heads."""
    if tower.heads < 1 or tower.width % tower.heads:
        raise ConfigError(f"{section}.width={tower.width} is not a multiple of {section}.heads={tower.heads}")


def require_local(name: str, path) -> None:
    """Raises ConfigError if an option's path to data is a URL. Data is read in random order, which needs a disk."""
    if "://" in str(path):
        raise ConfigError(
            f"{name}={path}: data must be in a local or mounted directory; mount the bucket (gcsfuse), or copy it"
        )


def get_dotted(config: ConfigDict, key: str):
    """Returns the value at a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def set_dotted(config: ConfigDict, key: str, value) -> None:
    """Sets the value of a dotted key."""
    section, _, name = key.rpartition(".")
    (get_dotted(config, section) if section else config)[name] = value


def flatten(config: dict, prefix="") -> dict:
    """Returns a nested dict as a flat one with dotted keys."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def list_unknown(options: dict, known: dict, prefix="") -> list[str]:
    """Returns the dotted keys of options that `known`, a configuration with every option, lacks; a section that it
    lacks counts as one."""
    unknown = []
    for key, value in options.items():
        if key not in known:
            unknown.append(f"{prefix}{key}")
        elif isinstance(value, dict) and isinstance(known[key], dict):
            unknown += list_unknown(value, known[key], f"{prefix}{key}.")
    return unknown


def diff_configs(old: dict, new: dict) -> dict[str, tuple]:
    """Returns the dotted keys in which two configurations differ, with (old, new) values; None stands for a missing
    key."""
    old_values, new_values = flatten(old), flatten(new)
    return {
        key: (old_values.get(key), new_values.get(key))
        for key in sorted(old_values.keys() | new_values.keys())
        if old_values.get(key) != new_values.get(key)
    }


def _join_names(names) -> str:
    """Returns names separated by commas."""
    return ", ".join(names)
