"""A model: two encoders and a matcher, chosen by name (docs/method.md)."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mefn_jax import losses
from mefn_jax.data.images import RESAMPLE, RESIZE_MODES
from mefn_jax.encoders.from_config import IMAGE_ENCODERS, TEXT_ENCODERS, build_image_encoder, build_text_encoder
from mefn_jax.encoders.grids import grid_boxes
from mefn_jax.encoders.inputs import dummy_images
from mefn_jax.encoders.lora import LoRA, lora_from_config
from mefn_jax.encoders.pooling import POOLINGS
from mefn_jax.encoders.regions import PROJECTIONS
from mefn_jax.encoders.transformer import ACTIVATIONS, REMAT
from mefn_jax.features import Features
from mefn_jax.matching.entropy import ENTROPIES
from mefn_jax.matching.hubness import HubnessCorrection
from mefn_jax.matching.matcher import Matcher
from mefn_jax.matching.mefn import BRANCHES, DIRECTIONS, GLOBAL_INPUTS
from mefn_jax.matching.scan import AGGREGATES, SCAN_DIRECTIONS
from mefn_jax.matching.sfe import CUES
from mefn_jax.matching.systems import MODELS
from mefn_jax.matching.visita import LEVELS
from mefn_jax.scoring.layouts import PackedTexts, PaddedTexts, Products, RegionBlock

# The values that an option may have.
MODEL_CHOICES = {
    "model": tuple(MODELS),
    "image.resize": RESIZE_MODES,
    "image.resample": tuple(RESAMPLE),
    "image.pooling": ("tower", *POOLINGS),
    "image.regions.projection": PROJECTIONS,
    "image.vit.activation": tuple(ACTIVATIONS),
    "text.bert.activation": tuple(ACTIVATIONS),
    "text.clip.activation": tuple(ACTIVATIONS),
    "text.siglip.activation": tuple(ACTIVATIONS),
    "train.remat": tuple(REMAT),
    "image.arch": tuple(IMAGE_ENCODERS),
    "text.arch": tuple(TEXT_ENCODERS),
    "text.pooling": ("tower", *POOLINGS),
    "matcher.entropy": ENTROPIES,  # itself, so that one that is added later counts
    "matcher.local": DIRECTIONS,
    "matcher.global_input": GLOBAL_INPUTS,
    "matcher.branches": BRANCHES,
    "matcher.direction": SCAN_DIRECTIONS,
    "matcher.aggregate": AGGREGATES,
    "matcher.levels": LEVELS,
    "matcher.attend": DIRECTIONS,
    "matcher.cues": CUES,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """Two encoders, a matcher and the hubness correction, as pure functions of the variables.

    The variables are a dict of the parameters by part, `{"image", "text", "matcher", "hubness", "loss"}`, and of
    `constants`, what is stored and not trained, by part as well. Parameters alone serve where a part has no constants.
    With LoRA, the adapters are a part `lora`; variables in which they are merged serve as well.

    Attributes:
        image, text: the encoders, from pixels, regions or tokens to Features.
        matcher: scores all pairs of Features.
        hubness: the hubness correction of all scores; None without one.
        loss: initial values of the loss's learned parameters.
        lora: the adapters of the towers; None without.
    """

    image: nn.Module
    text: nn.Module
    matcher: Matcher
    hubness: HubnessCorrection | None
    loss: dict
    lora: LoRA | None = None

    def init(self, key: jax.Array, images, ids, mask) -> dict:
        """Returns random variables. The inputs, those of `encode_images` and `encode_texts`, give the shapes."""
        image_key, text_key, matcher_key = jax.random.split(key, 3)
        image_features, image = self.image.init_with_output(image_key, images)
        text_features, text = self.text.init_with_output(text_key, ids, mask)
        features = image_features, text_features
        matcher = self.matcher.init(matcher_key, *features)
        hubness = {} if self.hubness is None else self.hubness.init(matcher_key, *self._embed_first(matcher, features))
        loss = {"params": {name: jnp.float32(value) for name, value in self.loss.items()}}
        parts = {"image": image, "text": text, "matcher": matcher, "hubness": hubness, "loss": loss}
        params = {name: variables.get("params", {}) for name, variables in parts.items()}
        constants = {name: variables["constants"] for name, variables in parts.items() if "constants" in variables}
        adapters = {} if self.lora is None else {"lora": self.lora.init(jax.random.fold_in(key, 3), params)}
        return params | adapters | {"constants": constants}

    def merge_adapters(self, variables: dict) -> dict:
        """Returns the variables with LoRA's adapters merged into the towers' matrices."""
        return variables if self.lora is None else self.lora.merge(variables)

    def _select_tower(self, params, tower: str) -> dict:
        """Returns the Flax variables of a tower, with its adapters merged."""
        return select_part(params if self.lora is None else self.lora.merge(params, (tower,)), tower)

    def _embed_first(self, matcher: dict, features) -> list:
        """Returns the embeddings of images and of texts, `features` before the matcher's transforms, during `init`."""
        transforms = "transform_images", "transform_texts"
        transformed = [self.matcher.apply(matcher, x, method=t) for x, t in zip(features, transforms, strict=True)]
        return [self.matcher.apply(matcher, x, method="embed") for x in transformed]

    def encode_images(self, params, images, dropout_key=None, keys=None) -> Features:
        """Returns the Features of images, uint8 pixels `(B, H, W, 3)` or precomputed regions float `(B, N, C)`, after
        the matcher's `transform_images`. With a `dropout_key`, and random `keys (B,)` of the items, they are encoded as
        in training."""
        features = _encode(self.image, self._select_tower(params, "image"), dropout_key, images, keys=keys)
        return self._apply_matcher(params, "transform_images", features)

    def encode_texts(self, params, ids, mask, dropout_key=None) -> Features:
        """Returns the Features of texts: token ids int32 `(B, L)` or cached words float `(B, M, C)`, and their mask,
        bool, after the matcher's `transform_texts`. With a `dropout_key`, they are encoded as in training."""
        features = _encode(self.text, self._select_tower(params, "text"), dropout_key, ids, mask)
        return self._apply_matcher(params, "transform_texts", features)

    def score(self, params, images: Features, texts: Features) -> jax.Array:
        """Returns the scores of all pairs, float32 `(I, T)`: cosine scale, higher is better, before the
        `hub_offsets` are subtracted."""
        return self._apply_matcher(params, "score", images, texts)

    def hub_offsets(self, params, images: Features, texts: Features) -> tuple[jax.Array, jax.Array]:
        """Returns the hubness offsets to subtract from the scores: of each image, float32 `(I,)`, and of each text,
        `(T,)` (docs/method.md, Eq. 35); zeros without a correction."""
        embeddings = self.embed(params, images), self.embed(params, texts)
        if self.hubness is None:
            return tuple(jnp.zeros(x.shape[:-1], jnp.float32) for x in embeddings)
        return self.hubness.apply(select_part(params, "hubness"), *embeddings)

    @property
    def projections(self) -> tuple[Callable, Callable]:
        """Returns the matcher's `project_regions` and `project_words` as functions `(params, vectors)`."""
        methods = "project_regions", "project_words"
        return tuple(lambda params, x, method=m: self._apply_matcher(params, method, x) for m in methods)

    def score_products(self, params, products: Products, regions: RegionBlock, words: PaddedTexts) -> jax.Array:
        """Returns `score` from inner products; only for a matcher with `has_products`."""
        return self._apply_matcher(params, "score_products", products, regions, words)

    def score_tile(
        self, params, products: Products, regions: RegionBlock, words: PaddedTexts | PackedTexts
    ) -> jax.Array:
        """Returns `score` of one tile, without gradients; only for a matcher with `has_tile`."""
        return self._apply_matcher(params, "score_tile", products, regions, words)

    @property
    def has_products(self) -> bool:
        """Returns whether the matcher has `score_products`."""
        return self.matcher.defines("score_products")

    @property
    def has_tile(self) -> bool:
        """Returns whether the matcher can score packed texts, which is faster."""
        return self.has_products or self.matcher.defines("score_tile")

    @property
    def has_pairs(self) -> bool:
        """Returns whether the matcher scores pairs of prepared items (`score_pairs`)."""
        return self.matcher.defines("score_pairs")

    @property
    def has_bound(self) -> bool:
        """Returns whether the first results can be found without scoring all pairs (`score_bound`)."""
        return self.has_pairs and self.matcher.defines("score_bound")

    @property
    def has_train_score(self) -> bool:
        """Returns whether the loss takes other scores than evaluation (`Matcher.train_score`)."""
        return self.matcher.defines("train_score")

    @property
    def has_entropies(self) -> bool:
        """Returns whether explained pairs have entropies and weights, as MEFN's."""
        return self.matcher.defines("explain")

    @property
    def has_attention(self) -> bool:
        """Returns whether the matcher has `attention`."""
        return self.matcher.defines("attention")

    @property
    def is_dual_encoder(self) -> bool:
        """Returns whether the score of a pair is the product of its two vectors (`image_vectors`, `text_vectors`)."""
        return self.matcher.is_dual_encoder

    @property
    def prepare(self) -> tuple[Callable, Callable]:
        """Returns the matcher's `prepare_images` and `prepare_texts` as functions `(params, features)`."""
        methods = "prepare_images", "prepare_texts"
        return tuple(lambda params, x, method=m: self._apply_matcher(params, method, x) for m in methods)

    def score_pairs(self, params, images, texts) -> jax.Array:
        """Returns the scores of pairs of prepared items, whose leading axes are broadcast, before the `hub_offsets` are
        subtracted; only for a matcher with `has_pairs`."""
        return self._apply_matcher(params, "score_pairs", images, texts)

    def floats_per_pair(self, images: Features, texts: Features) -> int:
        """Returns the largest number of float32 values that a pair takes at once while it is scored."""
        return self.matcher.floats_per_pair(images, texts)

    def score_bound(self) -> tuple[float, float]:
        """Returns the factor and the radius of the matcher's `score_bound`; only with `has_bound`."""
        return self.matcher.score_bound()

    def train_score(self, params, images: Features, texts: Features) -> jax.Array:
        """Returns the scores of all pairs that the loss takes, float32 `(I, T)`; only with `has_train_score`."""
        return self._apply_matcher(params, "train_score", images, texts)

    def fused_similarity(self, params, image_vectors, text_vectors) -> jax.Array:
        """Returns the matcher's `fused_similarity` of pairs of embeddings `(..., D)`, float32 `(...)`."""
        return self._apply_matcher(params, "fused_similarity", image_vectors, text_vectors)

    def embed(self, params, features: Features) -> jax.Array:
        """Returns one vector for each image or text, float32 `(B, D)`."""
        return self._apply_matcher(params, "embed", features)

    def image_vectors(self, params, images: Features) -> jax.Array:
        """Returns the vectors of images for candidates and indexes, float32 `(I, D)`. With a hubness correction each
        has one more coordinate, minus the offset of the image, so that the product with a text's vector ranks images as
        the corrected score does."""
        vectors = self.embed(params, images)
        if self.hubness is None:
            return vectors
        offsets, _ = self.hub_offsets(params, images, images)
        return jnp.concatenate([vectors, -offsets[:, None]], 1)

    def text_vectors(self, params, texts: Features) -> jax.Array:
        """Returns the vectors of texts, float32 `(T, D)`, which match those of `image_vectors`: where these have an
        additional coordinate, it is 1 here. If the matcher has a `score_bound`, the embedding is multiplied by its
        factor: the product of both vectors is then the middle of the interval that holds the score, apart from the
        text's hubness offset."""
        vectors = self.embed(params, texts)
        if self.has_bound:
            vectors *= self.score_bound()[0]
        if self.hubness is None:
            return vectors
        return jnp.concatenate([vectors, jnp.ones_like(vectors[:, :1])], 1)

    def explain(self, params, image: Features, text: Features) -> dict:
        """Returns the terms of one pair (Features without batch axis) that the matcher computes: those of its `explain`
        (see `MEFN.explain`), or without one the `score` and its attention, `word_attention`. The offsets
        `image_hub_offset` and `text_hub_offset` are added, which the score has subtracted."""
        batches = tuple(jax.tree.map(lambda x: x[None], features) for features in (image, text))
        if self.has_entropies:
            terms = self._apply_matcher(params, "explain", image, text)
        else:
            attention = self._apply_matcher(params, "attention", image, text)
            terms = {"score": self.score(params, *batches)[0, 0], "word_attention": attention}
        image_offset, text_offset = (x[0] for x in self.hub_offsets(params, *batches))
        terms["score"] -= image_offset + text_offset
        return terms | {"image_hub_offset": image_offset, "text_hub_offset": text_offset}

    def attention(self, params, image: Features, text: Features) -> jax.Array:
        """Returns the attention of each word over the regions of one pair, float32 `(N, M)`; columns sum to 1."""
        return self._apply_matcher(params, "attention", image, text)

    def scalars(self, params) -> dict:
        """Returns the learned scalars of the matcher and of the hubness correction by name."""
        scalars = self._apply_matcher(params, "scalars")
        if self.hubness is None:
            return scalars
        hubness = params["hubness"]
        return scalars | {"hub_weight": hubness["weight"], "hub_scale": jnp.exp(hubness["log_scale"])}

    def _apply_matcher(self, params, method: str, *inputs):
        return self.matcher.apply(select_part(params, "matcher"), *inputs, method=method)


def select_part(params, part: str) -> dict:
    """Returns the Flax variables of one part of a model: its parameters and its constants."""
    constants = params.get("constants", {}).get(part)
    return {"params": params[part]} | ({} if constants is None else {"constants": constants})


def split_constants(variables: dict) -> tuple[dict, dict]:
    """Returns the parameters and the constants of a model's variables."""
    params = {name: part for name, part in variables.items() if name != "constants"}
    return params, variables["constants"]


def _encode(encoder, variables, dropout_key, *inputs, **options) -> Features:
    """Applies an encoder: deterministically without a `dropout_key`, else as in training."""
    if dropout_key is None:
        return encoder.apply(variables, *inputs, **options)
    rngs = {"dropout": dropout_key}
    return encoder.apply(variables, *inputs, deterministic=False, rngs=rngs, **options)


def build_model(config: ConfigDict, vocab_size: int) -> Model:
    """Builds the model that a configuration describes; `vocab_size` is the tokenizer's."""
    matcher = MODELS[config.model].matcher(**config.matcher)
    hubness = HubnessCorrection(matcher.hub_vectors, matcher.init_hub_scale) if matcher.hub_vectors else None
    loss = losses.LOSSES[config.loss.name].initial
    image, text = build_image_encoder(config), build_text_encoder(config, vocab_size)
    return Model(image, text, matcher, hubness, loss, lora_from_config(config))


def region_boxes(config: ConfigDict, model: Model):
    """Returns the boxes of the regions, float64 `(N, 4)`: x0, y0, x1, y1 as fractions of the image's width and height.
    None for an encoder without grids: precomputed regions come without boxes."""
    if config.image.arch == "regions" or not hasattr(model.image, "backbone_features"):
        return None
    shapes = jax.eval_shape(model.image.init, jax.random.key(0), dummy_images(config))
    backbone_features = functools.partial(model.image.apply, method="backbone_features")
    grids, _ = jax.eval_shape(backbone_features, shapes, dummy_images(config))
    return np.concatenate([grid_boxes(*grid.shape[1:3]) for grid in grids])
