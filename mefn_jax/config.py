"""Configuration: the arguments of `get_config`, the command line's flags, and checks that name the option."""

import difflib
import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mefn_jax.errors import ConfigError, UserError

CHOICES = {
    "image.arch": ("resnet", "vit", "regions"),
    "text.punctuation": ("keep", "drop"),
    "train.dtype": ("float32", "bfloat16"),
    "train.start": ("random", "linear"),
    "image.resnet.norm": ("group", "batch"),
    "image.vit.pool": ("mean", "class", "tanh"),
}
DEFAULT_SIZE = 224  # of images, where neither the configuration nor a checkpoint says it
POSITIVE = (
    "embed_dim",
    "text.max_words",
    "train.batch_size",
    "train.learning_rate",
    "train.clip_norm",
    "train.encoder_parts",
    "train.tile_mib",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "data.threads",
    "eval.batch_size",
    "matcher.init_scale",
    "matcher.init_sharpness",
    "matcher.init_background_scale",
)
# Chances and shares: in [0, 1).
BELOW_ONE = (
    "image.resnet.stochastic_depth",
    "image.vit.dropout",
    "image.vit.stochastic_depth",
    "text.bert.dropout",
    "text.bert.stochastic_depth",
    "text.clip.dropout",
    "text.clip.stochastic_depth",
    "text.gru.dropout",
    "image.regions.channel_dropout",
    "text.channel_dropout",
    "train.warmup",
    "train.ema",
    "augment.colour",
    "augment.words",
    "augment.regions",
)
NOT_NEGATIVE = (
    "image.size",
    "image.regions.width",
    "image.regions.grid",
    "text.words.width",
    "data.hold_out",
    "matcher.background",
    "train.steps",
    "train.epochs",
    "train.seed",
    "train.weight_decay",
    "data.workers",
    "eval.val_images",
    "eval.tile_mib",
    "eval.explained",
)
PIXELS = {"augment.crop": 1.0, "augment.flip": 0.0, "augment.colour": 0.0}  # what changes pixels, and its off
# What the shape and meaning of the parameters depend on: a checkpoint is only continued with the same.
MODEL_KEYS = ("model", "embed_dim", "image", "text", "matcher")


def parse_arg(arg: str | None, **options):
    """Parses "a=x,b" into a dict of the given options (name=default). A bare name means True.

    Raises ConfigError for an unknown name, with the nearest one, and for a value where a bare name is meant.
    """
    values = dict(options)
    for part in filter(None, (arg or "").split(",")):
        name, has_value, value = part.partition("=")
        if name not in options:
            raise ConfigError(
                f"unknown configuration argument {name!r}{nearest(name, options)}; there are {_list(options)}"
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


def nearest(name: str, names) -> str:
    """ ", did you mean 'x'?" for the closest of `names`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def check(config: ConfigDict, choices: dict) -> None:
    """Raises ConfigError, naming the option, for values that cannot work. `choices` are the names that the model and
    the loss know, by option."""
    for key, names in (CHOICES | choices).items():
        value = get(config, key)
        if value not in names:
            raise ConfigError(f"{key}: {value!r} is not one of {_list(names)}{nearest(value, names)}")
    for key in POSITIVE:
        if not get(config, key) > 0:
            raise ConfigError(f"{key}: {get(config, key)!r} must be greater than 0")
    for key in NOT_NEGATIVE:
        if get(config, key) < 0:
            raise ConfigError(f"{key}: {get(config, key)!r} must not be negative")
    if len(config.data.scenes) != 3 or min(config.data.scenes) < 1:
        raise ConfigError(f"data.scenes: {tuple(config.data.scenes)} must be three numbers: train, val, test")
    if config.data.hold_out and not config.data.dir:
        raise ConfigError("data.hold_out: the drawn scenes have a val split of their own; give data.dir, or leave it 0")
    if (config.train.steps > 0) == (config.train.epochs > 0):
        raise ConfigError(
            f"train.steps={config.train.steps} and train.epochs={config.train.epochs}: set exactly one, the other to 0"
        )
    for key in BELOW_ONE:
        if not 0 <= get(config, key) < 1:
            raise ConfigError(f"{key}: {get(config, key)!r} must be in [0, 1)")
    for key in ("image.crop", "augment.crop", "train.layer_decay"):
        if not 0 < get(config, key) <= 1:
            raise ConfigError(f"{key}: {get(config, key)!r} must be in (0, 1]")
    for key in ("image.mean", "image.std"):
        if len(get(config, key)) != 3:
            raise ConfigError(f"{key}: {tuple(get(config, key))} must be three numbers, one a channel")
    if not 0 <= config.augment.flip <= 1:
        raise ConfigError(f"augment.flip: {config.augment.flip!r} must be in [0, 1]")
    for kind, check_tower in (("image", check_image_tower), ("text", check_text_tower)):
        towerless = config[kind].arch in ("regions", "words")
        if towerless or not config[kind].pretrained:  # else the sizes come from the checkpoint
            check_tower(config)


def check_image_tower(config: ConfigDict) -> None:
    """Raises ConfigError if the image tower's sizes cannot work with the input's size and the scales."""
    c = config.image
    if c.arch == "regions":
        if c.pretrained:
            raise ConfigError(f"image.pretrained={c.pretrained} is an image tower, but image.arch=regions has none")
        changed = [key for key, off in PIXELS.items() if get(config, key) != off]
        if changed:
            raise ConfigError(f"{changed[0]}={get(config, changed[0])} changes pixels, but image.arch=regions has none")
        return
    size = c.size or DEFAULT_SIZE
    if not c.scales or min(c.scales) < 1:
        raise ConfigError(f"image.scales: {tuple(c.scales)} must be numbers above 0, one a scale")
    if c.arch == "resnet" and len(c.scales) > len(c.resnet.depths):
        raise ConfigError(f"image.scales: {len(c.scales)} scales, but the ResNet has {len(c.resnet.depths)} stages")
    if c.arch == "vit":
        _check_heads("image.vit", c.vit)
        if c.vit.patch < 1 or c.vit.patch % 2 ** len(c.vit.stem):
            raise ConfigError(
                f"image.vit.patch={c.vit.patch} is not a multiple of {2 ** len(c.vit.stem)}, the stem's stride"
            )
        if size % c.vit.patch:
            raise ConfigError(f"image.size={size} is not a multiple of image.vit.patch={c.vit.patch}")


def check_text_tower(config: ConfigDict) -> None:
    """Raises ConfigError if the text tower's sizes cannot work with the captions' length."""
    arch, max_words = config.text.arch, config.text.max_words
    if arch == "words":
        if config.text.pretrained:
            raise ConfigError(f"text.pretrained={config.text.pretrained} is a text tower; set text.arch=bert to run it")
        if config.augment.words:
            raise ConfigError("augment.words changes tokens, but text.arch=words has none; set it to 0")
        return
    if arch == "gru" and config.text.channel_dropout:
        raise ConfigError("text.channel_dropout is of a projection, which text.arch=gru has none of; set it to 0")
    if arch not in ("bert", "clip"):  # any length
        return
    tower = config.text[arch]
    _check_heads(f"text.{arch}", tower)
    if max_words + 2 > tower.max_positions:
        raise ConfigError(
            f"text.max_words={max_words} with [CLS] and [SEP] exceeds text.{arch}.max_positions={tower.max_positions}"
        )


def _check_heads(section: str, tower: ConfigDict) -> None:
    if tower.heads < 1 or tower.width % tower.heads:
        raise ConfigError(f"{section}.width={tower.width} is not a multiple of {section}.heads={tower.heads}")


def check_local(name: str, path) -> None:
    """Raises ConfigError if the option's path, of data, is a URL: data is read at random, which takes a disk."""
    if "://" in str(path):
        raise ConfigError(
            f"{name}={path}: data must be in a local or mounted directory; mount the bucket (gcsfuse), or copy it"
        )


def get(config: ConfigDict, key: str):
    """The value at a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def flatten(config: dict, prefix="") -> dict:
    """A nested dict as one of dotted keys."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def differences(old: dict, new: dict) -> dict[str, tuple]:
    """The dotted keys at which two configurations differ, with (old, new) values; None where a key is missing."""
    a, b = flatten(old), flatten(new)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def run(main, define_flags) -> None:
    """Runs a command: `define_flags()` defines its flags, `main()` does the work. A UserError or a flag that cannot be
    parsed is printed in one line, without a traceback; the exit status is then 1 or 2."""

    def parse(argv):
        try:
            define_flags()
            for flag in flags.FLAGS.get_flags_for_module(__name__):  # so that --help lists those defined here too
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
            rest = flags.FLAGS(argv)
            if "config" in flags.FLAGS and flags.FLAGS.config is not None and not config_path().is_file():
                raise ConfigError(f"--config={config_path()}: no such file")
            return rest
        except (flags.Error, UserError, AttributeError, KeyError, FileNotFoundError, ValueError) as e:
            _fail(_flag_message(e), 2)

    def guarded(argv):
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; options start with --", 2)
        try:
            main()
        except UserError as e:
            _fail(str(e), 1)
        except BrokenPipeError:  # what reads the output has enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would say it again at exit
            sys.exit(1)

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=parse)


def config_flag(default: str | None) -> None:
    """Defines `--config=FILE.py[:arguments]` and its `--config.key=value` overrides; without a default it may be left
    out, and is then None."""
    config_flags.DEFINE_config_file(
        "config", default, "Configuration file, with arguments after a colon.", lock_config=True
    )


def process_flags() -> None:
    """Defines the flags of a command that several processes may run together."""
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where neither TPUs nor Slurm say it.")
    flags.DEFINE_integer("processes", 0, "With --coordinator: how many processes there are.", lower_bound=0)
    flags.DEFINE_integer("process", -1, "With --coordinator: which of them this is, from 0.")
    flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for the other processes at the start.", lower_bound=1)


def compile_flags() -> None:
    """Defines the flags of compiling for a TPU slice instead of running."""
    flags.DEFINE_string("compile_for", "", "Only compile, for a TPU slice such as v5e:16x16, and report.")
    flags.DEFINE_string("compile_report", "", "With --compile_for: a file that gets the report as JSON.")


def config_path() -> Path:
    """The file that `--config` names, without its arguments."""
    flag = flags.FLAGS["config"]
    return Path(getattr(flag, "config_filename", flag.value).partition(":")[0])  # or a plain string


def _flag_message(error: Exception) -> str:
    text = str(error.args[0] if error.args else error)
    if not isinstance(error, AttributeError | KeyError):
        return " ".join(text.split("\n"))
    # ml_collections hands on the repr of a KeyError; its second line holds the nearest name.
    lines = [line.strip("'\" ") for line in text.replace("\\n", "\n").replace("\\'", "'").split("\n")]
    return f"unknown configuration key {lines[0]!r}. {' '.join(lines[1:])}".strip()


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _list(names) -> str:
    return ", ".join(names)
