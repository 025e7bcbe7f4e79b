"""Opens the data that a configuration names, and fits the configuration to it."""

import ml_collections

from mefn_jax.data.dataset import Dataset
from mefn_jax.data.prepare import open_drawn_scenes
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.errors import ConfigError


def open_dataset(config) -> Dataset:
    """The data set of a configuration: `data.dir`, or the drawn scenes."""
    d = config.data
    directory = d.dir or open_drawn_scenes(d.scenes, d.scene_seed)
    return Dataset(directory, d.skip_undecodable, d.held_out_images, d.cached_text, config.text.max_tokens)


def fill_data_widths(config: ml_collections.ConfigDict, split: Split) -> ml_collections.ConfigDict:
    """The configuration with the widths of precomputed regions and of cached words. Raises ConfigError if the towers
    cannot take what the split has: images or regions, text or words, of this width."""
    config = config.copy_and_resolve_references().unlock()
    if (config.text.arch == "cached") != bool(split.cached_text):
        raise ConfigError("text.arch=cached reads the cached words in data.cached_text: set both, or neither")
    if split.cached_text:
        config.text.cached.width = _width(
            "words", "text.cached.width", config.text.cached.width, split.cached_text.width
        )
    takes_regions = config.image.arch == "regions"
    if takes_regions != bool(split.region_width):
        wanted, found = ("regions", "images") if takes_regions else ("images", "precomputed regions")
        raise ConfigError(
            f"image.arch={config.image.arch} takes {wanted}, but the data set has {found}; set --config.image.arch to "
            f"{'resnet or vit' if takes_regions else 'regions'}, or choose another data set"
        )
    if takes_regions:
        width = config.image.regions.width
        config.image.regions.width = _width("regions", "image.regions.width", width, split.region_width)
    return config.lock()


def make_tokenizer(config, json: str) -> Tokenizer:
    """Returns the tokenizer whose `tokenizer.json` has the text `json`, with the options of `config.text`."""
    c = config.text
    return Tokenizer(json, c.max_tokens, c.lower_case, c.punctuation)


def _width(what: str, option: str, wanted: int, found: int) -> int:
    if wanted not in (0, found):
        raise ConfigError(f"the data set's {what} are {found} wide, {option} is {wanted}")
    return found
