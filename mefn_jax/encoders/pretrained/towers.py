"""Insertion of pretrained towers into a configuration and into a model's parameters."""

from pathlib import Path

import jax.numpy as jnp
from ml_collections import ConfigDict

from mefn_jax.config import DEFAULT_SIZE, JOINT_SYSTEMS, check_image_tower, check_text_tower
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.encoders.bert import BERT
from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.pretrained import preprocessor, weights
from mefn_jax.encoders.pretrained.sentence_transformers import note_unread_modules
from mefn_jax.encoders.pretrained.tokenizer_files import read_tokenizer
from mefn_jax.encoders.pretrained.weights import Tower
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.encoders.siglip_text import SigLIPText
from mefn_jax.encoders.vit import ViT
from mefn_jax.errors import WeightsError
from mefn_jax.runtime.console import print0

# Names of `image.arch` and `text.arch`, the section of the options, by the class of the module.
ARCHS = {ResNet: "resnet", ViT: "vit", BERT: "bert", CLIPText: "clip", SigLIPText: "siglip"}
# Options that `load_pretrained` sets in each section, in addition to the sizes of the tower.
LOADED_KEYS = {
    "image": ("arch", "resize", "crop", "resample", "mean", "std"),
    "text": ("arch", "vocab_size", "lower_case", "punctuation", "start_token"),
}


def load_pretrained(config: ConfigDict) -> tuple[ConfigDict, dict[str, Tower], str | None]:
    """Loads the pretrained towers that a configuration names.

    Returns the configuration with the sizes and the preprocessing of the towers; the towers by "image" and "text"; and
    the tokenizer.json of the text tower as text, None without a pretrained text tower. Raises WeightsError for a
    checkpoint that cannot be used, ConfigError for options that its sizes do not allow.
    """
    config = config.copy_and_resolve_references().unlock()
    towers, tokenizer_json = {}, None
    if config.image.pretrained:
        directory = weights.locate_checkpoint(config.image.pretrained)
        tower = towers["image"] = weights.load_tower(directory, "image")
        config.image.arch = ARCHS[type(tower.module)]
        config.image[config.image.arch].update(weights.module_options(tower.module))
        preprocessing = preprocessor.read_preprocessing(directory)
        if not preprocessing:
            print0(f"note: {directory} has no preprocessor_config.json; images are preprocessed by the options image.*")
        if config.image.size not in (0, preprocessing.get("size", config.image.size)):
            print0(f"note: image.size={config.image.size}, but {directory} was trained at {preprocessing['size']}")
        config.image.update(preprocessing | {"size": config.image.size or preprocessing.get("size", DEFAULT_SIZE)})
        check_image_tower(config)
    if config.text.pretrained:
        directory = weights.locate_checkpoint(config.text.pretrained)
        tower = towers["text"] = weights.load_tower(directory, "text")
        config.text.arch = ARCHS[type(tower.module)]
        sizes = weights.module_options(tower.module)
        config.text.vocab_size = sizes.pop("vocab_size")
        # The checkpoint's tokenizer normalizes captions itself.
        config.text.update(lower_case=False, punctuation="keep")
        tokenizer_json = read_tokenizer(directory)
        tokenizer = Tokenizer(tokenizer_json, 1, False, "keep")
        config.text.start_token = tokenizer.start_token
        if "pad_id" in sizes:
            sizes["pad_id"] = _choose_pad_id(directory, tower.module, tokenizer)
        config.text[config.text.arch].update(sizes)
        if config.text.arch == "clip":
            _check_end_token(directory, tokenizer)
        note_unread_modules(directory, config.text.pooling)
        check_text_tower(config)
    config.image.size = config.image.size or DEFAULT_SIZE
    if config.model in JOINT_SYSTEMS:
        config.embed_dim = _choose_joint_width(config, towers)
    return config.lock(), towers, tokenizer_json


def _choose_pad_id(directory: Path, module: BERT | SigLIPText, tokenizer: Tokenizer) -> int:
    """Returns the id of the padding that a text tower reads: the tokenizer's, unless it counts positions as BERT does
    (-1). Raises WeightsError if RoBERTa's positions would count from another token than the tokenizer's padding."""
    if isinstance(module, SigLIPText):  # whose config.json names an id that no tokenizer has
        return tokenizer.pad
    if module.pad_id not in (-1, tokenizer.pad):
        raise WeightsError(
            f"{directory}/config.json: pad_token_id {module.pad_id} of the text tower is not {tokenizer.pad}, the "
            "tokenizer's padding, from which positions are counted; take both from the same checkpoint"
        )
    return module.pad_id


def _check_end_token(directory: Path, tokenizer: Tokenizer) -> None:
    """Raises WeightsError if `transformers` would pool at another token than the tokenizer's end of a caption."""
    named = weights.select_tower(weights.read_config(directory), "text").get("eos_token_id")
    # In configurations of the first CLIPs the id is 2 by mistake, and the token with the largest id is meant.
    pooled = tokenizer.vocab_size - 1 if named == 2 else named
    if pooled != tokenizer.sep:
        raise WeightsError(
            f"{directory}/config.json: eos_token_id {str(named)[:40]} of the text tower is not {tokenizer.sep}, the "
            "tokenizer's end of text; take both from the same checkpoint"
        )


def _choose_joint_width(config: ConfigDict, towers: dict[str, Tower]) -> int:
    """Returns the width of the joint space of CLIP or SigLIP: that of the checkpoints' projections, or `embed_dim` if
    they have none. Raises WeightsError if the two towers differ."""
    widths = {tower.projection.shape[1] for tower in towers.values() if tower.projection is not None}
    if len(widths) > 1:
        raise WeightsError(
            f"{config.image.pretrained} and {config.text.pretrained}: their projections have the widths "
            f"{' and '.join(map(str, sorted(widths)))}; give both towers of the same checkpoint"
        )
    return widths.pop() if widths else config.embed_dim


def keep_saved_options(config: ConfigDict, saved: ConfigDict) -> ConfigDict:
    """Returns the configuration of a run that is resumed, with the options of its pretrained towers from `saved`.

    `saved` holds the options that `load_pretrained` took from the towers when the run started, so that the checkpoints
    of the towers are no longer needed. Options in `TRAINING_OPTIONS` keep the values of `config`.
    """
    config = config.copy_and_resolve_references().unlock()
    for kind, keys in LOADED_KEYS.items():
        options, saved_options = config[kind], saved[kind]
        options.pretrained = options.pretrained or saved_options.pretrained
        if saved_options.pretrained:
            training_options = {k: v for k, v in options[saved_options.arch].items() if k in weights.TRAINING_OPTIONS}
            options.update({key: saved_options[key] for key in keys})
            options[saved_options.arch] = saved_options[saved_options.arch]
            options[saved_options.arch].update(training_options)
    config.image.size = config.image.size or saved.image.size
    if config.model in JOINT_SYSTEMS and (config.image.pretrained or config.text.pretrained):
        config.embed_dim = saved.embed_dim
    return config.lock()


def check_vocabulary(config: ConfigDict, vocab_size: int) -> None:
    """Raises WeightsError if the tokenizer has more tokens than the word embedding of the text tower."""
    if config.text.vocab_size and vocab_size > config.text.vocab_size:
        raise WeightsError(
            f"{config.text.pretrained or 'text.vocab_size'}: the tokenizer has {vocab_size} tokens, the embedding "
            f"{config.text.vocab_size} rows; take both from the same checkpoint"
        )


def insert_pretrained(params: dict, towers: dict[str, Tower]) -> dict:
    """Returns the variables `params` with the parameters and constants of the towers.

    From a CLIP or SigLIP, also inserts the projection of the pooled states if it is as wide as the joint space (prints
    a note if not), and the logit scale and bias if the loss has them.
    """
    params = dict(params)
    for kind, tower in towers.items():
        encoder = params[kind] = dict(params[kind]) | {"backbone": tower.params}
        if tower.constants:
            constants = params["constants"]
            params["constants"] = constants | {kind: constants[kind] | {"backbone": tower.constants}}
        pooled_params = encoder.get("pooled")
        if tower.projection is not None and pooled_params:
            if tower.projection.shape == pooled_params["kernel"].shape:
                encoder["pooled"] = {"kernel": tower.projection, "bias": 0 * pooled_params["bias"]}
            else:
                widths = tower.projection.shape[1], pooled_params["kernel"].shape[1]
                print0("note: the projection to {} dimensions is not used, because embed_dim is {}".format(*widths))
        learned = {"scale": tower.logit_scale, "bias": tower.logit_bias}
        params["loss"] = params["loss"] | {
            name: jnp.float32(value) for name, value in learned.items() if value is not None and name in params["loss"]
        }
    return params
