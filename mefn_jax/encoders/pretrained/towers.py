"""Pretrained towers put into a configuration and into a model's parameters."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from mefn_jax.config import DEFAULT_SIZE, check_image_tower, check_text_tower
from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.pretrained import preprocessor, weights
from mefn_jax.encoders.pretrained.weights import Tower
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.errors import WeightsError
from mefn_jax.runtime.console import print0

# What `load` sets in each section, beside the tower's own.
LOADED_KEYS = {
    "image": ("arch", "resize", "crop", "resample", "mean", "std"),
    "text": ("arch", "vocab_size", "lower_case", "punctuation"),
}


def load_pretrained(config: ConfigDict) -> tuple[ConfigDict, dict[str, Tower], str | None]:
    """The pretrained towers that a configuration names, by "image" and "text"; the configuration with their sizes and
    preprocessing; and the text of the text tower's tokenizer, None without one.

    Raises WeightsError for a checkpoint that cannot be used, ConfigError for options that its sizes do not allow.
    """
    config = config.copy_and_resolve_references().unlock()
    towers, json = {}, None
    if config.image.pretrained:
        directory = weights.locate_checkpoint(config.image.pretrained)
        tower = towers["image"] = weights.load_tower(directory, "image")
        config.image.arch = "resnet" if isinstance(tower.module, ResNet) else "vit"
        config.image[config.image.arch].update(weights.options(tower.module))
        found = preprocessor.preprocessing(directory)
        if not found:
            print0(f"note: {directory} says nothing of preprocessing; images are made as image.* is configured")
        if config.image.size not in (0, found.get("size", config.image.size)):
            print0(f"note: image.size={config.image.size}, while {directory} was made for {found['size']}")
        config.image.update(found | {"size": config.image.size or found.get("size", DEFAULT_SIZE)})
        check_image_tower(config)
    if config.text.pretrained:
        directory = weights.locate_checkpoint(config.text.pretrained)
        tower = towers["text"] = weights.load_tower(directory, "text")
        config.text.arch = "clip" if isinstance(tower.module, CLIPText) else "bert"
        sizes = weights.options(tower.module)
        config.text.vocab_size = sizes.pop("vocab_size")
        config.text[config.text.arch].update(sizes)
        # What is to be done to a caption is the tokenizer's business.
        config.text.update(lower_case=False, punctuation="keep")
        json = weights.read_tokenizer(directory)
        check_text_tower(config)
    config.image.size = config.image.size or DEFAULT_SIZE
    if config.model == "clip":
        config.embed_dim = _joint_width(config, towers)
    return config.lock(), towers, json


def _joint_width(config: ConfigDict, towers: dict[str, Tower]) -> int:
    """CLIP's joint space is as wide as its checkpoint has it."""
    widths = {tower.projection.shape[1] for tower in towers.values() if tower.projection is not None}
    if len(widths) > 1:
        raise WeightsError(
            f"{config.image.pretrained} and {config.text.pretrained}: their projections have the widths "
            f"{' and '.join(map(str, sorted(widths)))}; they are not of one CLIP"
        )
    return widths.pop() if widths else config.embed_dim


def keep_saved_options(config: ConfigDict, saved: ConfigDict) -> ConfigDict:
    """The configuration of a run that goes on: what `load` took from pretrained towers when it began is in `saved`, so
    that they need not be there any more."""
    config = config.copy_and_resolve_references().unlock()
    for kind, keys in LOADED_KEYS.items():
        ours, theirs = config[kind], saved[kind]
        ours.pretrained = ours.pretrained or theirs.pretrained
        if theirs.pretrained:
            trained = {k: v for k, v in ours[theirs.arch].items() if k in weights.TRAINING_OPTIONS}
            ours.update({key: theirs[key] for key in keys})
            ours[theirs.arch] = theirs[theirs.arch]
            ours[theirs.arch].update(trained)
    config.image.size = config.image.size or saved.image.size
    if config.model == "clip" and (config.image.pretrained or config.text.pretrained):
        config.embed_dim = saved.embed_dim
    return config.lock()


def check_vocabulary(config: ConfigDict, vocab_size: int) -> None:
    """Raises WeightsError if the tokenizer has more tokens than the text tower's embedding."""
    if config.text.vocab_size and vocab_size > config.text.vocab_size:
        raise WeightsError(
            f"{config.text.pretrained or 'text.vocab_size'}: the tokenizer has {vocab_size} tokens, the embedding "
            f"{config.text.vocab_size}; they are not of one checkpoint"
        )


def insert_pretrained(params: dict, towers: dict[str, Tower]) -> dict:
    """`params` with the towers' parameters; with CLIP's projection of the pooled states, where the joint space has its
    width, and its scale, where the loss has one."""
    params = dict(params)
    for kind, tower in towers.items():
        encoder = params[kind] = dict(params[kind]) | {"backbone": tower.params}
        head = encoder.get("pooled")
        if tower.projection is not None and head:
            if tower.projection.shape == head["kernel"].shape:
                encoder["pooled"] = {"kernel": tower.projection, "bias": 0 * head["bias"]}
            else:
                widths = tower.projection.shape[1], head["kernel"].shape[1]
                print0("note: CLIP's projection to {} dimensions is not used, embed_dim is {}".format(*widths))
        if tower.logit_scale is not None and "scale" in params["loss"]:
            params["loss"] = params["loss"] | {"scale": jnp.float32(tower.logit_scale)}
    return params
