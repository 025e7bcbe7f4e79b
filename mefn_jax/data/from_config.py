"""Data set and tokenizer of a configuration, and the options that follow from the data."""

import ml_collections

from mefn_jax.data.dataset import Dataset
from mefn_jax.data.mixed_dataset import MixedDataset
from mefn_jax.data.mixture import parse_mixture
from mefn_jax.data.prepare import open_drawn_scenes
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.errors import ConfigError


def open_dataset(config) -> Dataset | MixedDataset:
    """Opens the data set of a configuration: `data.dir`, a mixture if it names one, or the drawn scenes if it is empty.

    Raises ConfigError for a malformed mixture, and for a mixture with cached text or hard negatives, which belong to
    one data set."""
    d = config.data
    mixture = parse_mixture(d.dir)
    if len(mixture) > 1:
        if d.cached_text:
            raise ConfigError("data.cached_text belongs to one data set; leave it empty, or give data.dir one data set")
        if d.negatives:
            raise ConfigError("data.negatives does not go with a mixture: mine from one data set and train on it alone")
        return MixedDataset(mixture, d.skip_undecodable, d.held_out_images)
    directory = d.dir or open_drawn_scenes(d.scenes, d.scene_seed)
    return Dataset(directory, d.skip_undecodable, d.held_out_images, d.cached_text, config.text.max_tokens)


def fill_data_widths(config: ml_collections.ConfigDict, split: Split) -> ml_collections.ConfigDict:
    """Returns the configuration with the widths of the split's precomputed regions and cached text filled in.

    Raises ConfigError if the encoders cannot take this split: images or regions, text or cached text, another width.
    """
    config = config.copy_and_resolve_references().unlock()
    if (config.text.arch == "cached") != bool(split.cached_text):
        raise ConfigError("text.arch=cached reads data.cached_text; set both options, or neither")
    if split.cached_text:
        config.text.cached.width = _check_width(
            "words", "text.cached.width", config.text.cached.width, split.cached_text.width
        )
    takes_regions = config.image.arch == "regions"
    if takes_regions != bool(split.region_width):
        expected, present = ("regions", "images") if takes_regions else ("images", "precomputed regions")
        raise ConfigError(
            f"image.arch={config.image.arch} takes {expected}, but the data set has {present}; set "
            f"--config.image.arch to {'resnet or vit' if takes_regions else 'regions'}, or choose another data set"
        )
    if takes_regions:
        width = config.image.regions.width
        config.image.regions.width = _check_width("regions", "image.regions.width", width, split.region_width)
    return config.lock()


def make_tokenizer(config, json: str) -> Tokenizer:
    """Builds the tokenizer from `json`, the content of a `tokenizer.json`, with the options of `config.text`. Raises
    ConfigError if the tokenizer puts a start token before captions and the options say otherwise, or the reverse."""
    c = config.text
    tokenizer = Tokenizer(json, c.max_tokens, c.lower_case, c.punctuation)
    if c.arch != "cached" and tokenizer.start_token != c.start_token:
        raise ConfigError(
            f"text.start_token={c.start_token}, but the tokenizer puts {'a' if tokenizer.start_token else 'no'} start "
            f"token before captions; set --config.text.start_token={tokenizer.start_token}"
        )
    return tokenizer


def _check_width(kind: str, option: str, configured: int, width: int) -> int:
    """Returns the width of the data. Raises ConfigError if the option is neither 0 nor equal to it."""
    if configured not in (0, width):
        raise ConfigError(
            f"the data set's {kind} are {width} wide, but {option}={configured}; set it to 0, or choose another data "
            "set"
        )
    return width
