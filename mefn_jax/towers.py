"""Pretrained towers put into a configuration and into a model's parameters."""

from ml_collections import ConfigDict

from mefn_jax.encoders import pretrained
from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.errors import WeightsError


def adopt(config: ConfigDict, vocab_size: int) -> tuple[ConfigDict, dict[str, pretrained.Tower]]:
    """The configuration with the sizes of the pretrained towers that it names, and these towers, by "image", "text".

    Raises WeightsError for a checkpoint that cannot be used, or that knows fewer tokens than the tokenizer has.
    """
    config = config.copy_and_resolve_references().unlock()
    towers = {}
    if config.image.pretrained:
        tower = towers["image"] = pretrained.load(config.image.pretrained, "image")
        config.image.arch = "resnet" if isinstance(tower.module, ResNet) else "vit"
        config.image[config.image.arch].update(pretrained.options(tower.module))
        found = pretrained.normalisation(config.image.pretrained)
        if found:
            config.image.mean, config.image.std = found
    if config.text.pretrained:
        tower = towers["text"] = pretrained.load(config.text.pretrained, "text")
        config.text.arch = "clip" if isinstance(tower.module, CLIPText) else "bert"
        config.text.update(pretrained.options(tower.module) | {"dropout": config.text.dropout})
        if vocab_size > config.text.vocab_size:
            raise WeightsError(
                f"{config.text.pretrained}: the tokenizer has {vocab_size} tokens, the embedding "
                f"{config.text.vocab_size}; they are not of one checkpoint"
            )
    return config.lock(), towers


def with_pretrained(params: dict, towers: dict[str, pretrained.Tower]) -> dict:
    """`params` with the towers' parameters; and CLIP's projection of the pooled states, where the joint space has its
    width."""
    params = dict(params)
    for kind, tower in towers.items():
        encoder = params[kind] = dict(params[kind]) | {"backbone": tower.params}
        if tower.projection is not None and tower.projection.shape == encoder["pooled"]["kernel"].shape:
            bias = encoder["pooled"]["bias"]
            encoder["pooled"] = {"kernel": tower.projection, "bias": 0 * bias}
    return params
