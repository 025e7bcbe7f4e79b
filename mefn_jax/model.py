"""encoder x matcher, by name (DESIGN.md 2). `MODELS` is the project's only registry."""

import dataclasses

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from mefn_jax.encoders import pretrained
from mefn_jax.encoders.bert import BERT
from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.image import ImageEncoder
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.encoders.text import TextEncoder
from mefn_jax.encoders.vit import ViT
from mefn_jax.errors import WeightsError
from mefn_jax.matching.cosine import PooledCosine
from mefn_jax.matching.entropy import ENTROPIES
from mefn_jax.matching.features import Features
from mefn_jax.matching.mefn import ATTEND, GLOBAL_INPUT, MEFN

# A name's matcher class, and the arguments that make it that system; MEFN's others come from `config.matcher`.
MODELS = {
    "mefn": (MEFN, {}),
    "mefn_no_entropy": (MEFN, {"entropy": "none"}),
    "mefn_no_local": (MEFN, {"branches": "global"}),
    "mefn_no_global": (MEFN, {"branches": "local"}),
    "vsepp": (PooledCosine, {}),
}
# The names that an option may have.
CHOICES = {
    "model": tuple(MODELS),
    "text.arch": ("bert", "clip"),
    "matcher.entropy": tuple(ENTROPIES),
    "matcher.attend": ATTEND,
    "matcher.global_input": GLOBAL_INPUT,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """Two encoders and a matcher as pure functions of `params = {"image", "text", "matcher", "loss"}`."""

    image: nn.Module
    text: nn.Module
    matcher: nn.Module

    def init(self, key: jax.Array, pixels, ids, mask) -> dict:
        """Random parameters. `pixels` uint8 `(B, H, W, 3)`, `ids` int32 and `mask` bool `(B, L)` give the shapes."""
        image_key, text_key, matcher_key = jax.random.split(key, 3)
        image = self.image.init(image_key, pixels)
        text = self.text.init(text_key, ids, mask)
        features = self.image.apply(image, pixels), self.text.apply(text, ids, mask)
        matcher = self.matcher.init(matcher_key, *features)
        # The triplet loss has no parameters of its own.
        return {"image": image["params"], "text": text["params"], "matcher": matcher.get("params", {}), "loss": {}}

    def encode_images(self, params, pixels, dropout_key=None) -> Features:
        """Features of uint8 pixels `(B, H, W, 3)`; with a `dropout_key`, as in training."""
        return _encode(self.image, params["image"], dropout_key, pixels)

    def encode_texts(self, params, ids, mask, dropout_key=None) -> Features:
        """Features of token ids int32 and mask bool `(B, L)`; with a `dropout_key`, as in training."""
        return _encode(self.text, params["text"], dropout_key, ids, mask)

    def score(self, params, images: Features, texts: Features) -> jax.Array:
        """All pairs, float32 `(I, T)`, cosine scale, higher is better."""
        return self.matcher.apply({"params": params["matcher"]}, images, texts)

    def explain(self, params, image: Features, text: Features) -> dict:
        """What the matcher computes of one pair (Features without batch axis); see `MEFN.explain`."""
        return self.matcher.apply({"params": params["matcher"]}, image, text, method="explain")

    def learned(self, params) -> dict:
        """The matcher's learned scalars by name; empty for a matcher without any."""
        if not hasattr(self.matcher, "learned"):
            return {}
        return self.matcher.apply({"params": params["matcher"]}, method="learned")


def _encode(encoder, params, dropout_key, *inputs) -> Features:
    if dropout_key is None:
        return encoder.apply({"params": params}, *inputs)
    return encoder.apply({"params": params}, *inputs, deterministic=False, rngs={"dropout": dropout_key})


TEXT_ARCHS = {"bert": BERT, "clip": CLIPText}


def build(config: ConfigDict, vocab_size: int) -> Model:
    """The model that a configuration describes."""
    backbone = ResNet(**config.image.resnet) if config.image.arch == "resnet" else ViT(**config.image.vit)
    image = ImageEncoder(
        backbone, config.embed_dim, config.image.grid, tuple(config.image.mean), tuple(config.image.std)
    )
    arch = TEXT_ARCHS[config.text.arch]
    names = {f.name for f in dataclasses.fields(arch)}
    text = arch(
        config.text.vocab_size or vocab_size, **{k: v for k, v in config.text.items() if k in names - {"vocab_size"}}
    )
    matcher, fixed = MODELS[config.model]
    options = (config.matcher.to_dict() | fixed) if matcher is MEFN else fixed
    return Model(image, TextEncoder(text, config.embed_dim), matcher(**options))


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
