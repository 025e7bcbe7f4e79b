"""SFE's matcher (Wang et al. 2025) as read in docs/method.md, section 17: semantic cues from outside of a pair, then
from inside.

The external step (`transform_images`, `transform_texts`) enhances each item by concepts and by what these occur with in
the training data; it is computed once for each item. The internal step compares what the two items of a pair attend to
in each other. Letters are those of `scoring/layouts.py`; K concepts a side.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mefn_jax.features import MASKED_LOGIT, Features, unit
from mefn_jax.matching import concepts as corpus
from mefn_jax.matching.gram import TINY, inverse_sqrt, limit_scale
from mefn_jax.matching.matcher import Matcher
from mefn_jax.scoring.layouts import PackedTexts, PaddedTexts, Products, RegionBlock, replace_zeros

CUES = ("patch", "instance", "neighbour")
MESSAGE_SLOPE = 0.2  # of the leaky ReLU
SMALLEST_MEAN = 1e-4  # length of a difference of means that is more than rounding


class Nodes(nn.Module):
    """Vectors of concepts: their initial values, which are constants, plus a learned difference.

    Attributes:
        number: K.
    """

    number: int

    @nn.compact
    def __call__(self, width: int):
        """Returns the vectors, float32 `(K, D)`, and which of them are in use, bool `(K,)`."""
        initial = self.variable("constants", "initial", jnp.zeros, (self.number, width))
        learned = self.param("learned", nn.initializers.zeros, (self.number, width))
        in_use = jnp.any(initial.value != 0, 1)
        return initial.value + learned, in_use


class ExternalStep(nn.Module):
    """Enhancement of one kind of items by concepts (docs/method.md, Eqs. 83 to 87).

    Attributes:
        cues: names of CUES whose edges are followed; at least one.
        number: K.
        init_gamma, init_share: initial inverse temperature and share of the concepts, both learned.
    """

    cues: tuple[str, ...]
    number: int
    init_gamma: float
    init_share: float

    @nn.compact
    def __call__(self, features: Features, own_nodes, other_nodes, in_use) -> Features:
        """Returns the enhanced Features. `own_nodes (K, D)` are concepts of their kind, `in_use (K,)` says which of
        these exist, and `other_nodes (K, D)` are those of the other kind."""
        constant = nn.initializers.constant
        log_gamma = self.param("log_gamma", constant(jnp.log(self.init_gamma)), ())
        share_logit = self.param("share_logit", constant(jnp.log(self.init_share / (1 - self.init_share))), ())
        share = nn.sigmoid(share_logit)
        enhanced = self._enhance_concepts(own_nodes, other_nodes)
        logits = jnp.exp(log_gamma) * features.fragments @ unit(own_nodes).T  # (B, L, K)
        evoked = nn.softmax(jnp.where(in_use, logits, MASKED_LOGIT)) @ enhanced  # (B, L, D)
        fragments = unit((1 - share) * features.fragments + share * evoked) * features.mask[..., None]
        count = jnp.maximum(jnp.sum(features.mask, 1), 1)[:, None]
        mean = jnp.sum(evoked * features.mask[..., None], 1) / count
        pooled = unit((1 - share) * features.pooled + share * mean)
        return features.replace(fragments=fragments, pooled=pooled)

    def _enhance_concepts(self, own_nodes, other_nodes):
        """Returns the concepts `(K, D)` after one graph layer for each cue, averaged with learned shares."""
        layers = []
        for cue in self.cues:
            edges = self.variable("constants", cue, jnp.zeros, (self.number, self.number))
            messages = edges.value @ (own_nodes if cue == "patch" else other_nodes)
            messages = nn.Dense(own_nodes.shape[1], use_bias=False, name=f"{cue}_layer")(messages)
            layers.append(unit(own_nodes + nn.leaky_relu(messages, MESSAGE_SLOPE)))
        if len(layers) == 1:
            return layers[0]
        shares = nn.softmax(self.param("cue_logits", nn.initializers.zeros, (len(layers),)))
        return sum(weight * layer for weight, layer in zip(shares, layers, strict=True))


class SFE(Matcher, kw_only=True):
    """Matcher of SFE: the scores of all pairs, cosine scale (docs/method.md, Eqs. 80 to 92).

    Attributes:
        concepts: number of textual concepts and of visual concepts, at most.
        neighbours: number of similar training images from whose captions an image learns.
        edges: number of edges that a concept keeps, the strongest.
        cues: names of CUES, where concepts occur together; (): without the external step.
        internal: whether the score has the internal step.
        init_gamma: initial inverse temperature with which fragments evoke concepts; learned as a logarithm.
        init_share: initial share of the evoked concepts in the enhanced features; learned.
        init_lambda: initial inverse temperature of the internal step's attention; learned, at most 32 is used.
    """

    concepts: int = 300
    neighbours: int = 5
    edges: int = 10
    cues: tuple[str, ...] = CUES
    internal: bool = True
    init_gamma: float = 10.0
    init_share: float = 0.15
    init_lambda: float = 9.0

    def setup(self):
        """Creates the nodes and the two sides' external steps, and the scalars of the internal step."""
        if self.cues:
            self.visual_nodes, self.textual_nodes = Nodes(self.concepts), Nodes(self.concepts)
            options = tuple(self.cues), self.concepts, self.init_gamma, self.init_share
            self.image_step, self.text_step = ExternalStep(*options), ExternalStep(*options)
        if self.internal:
            self.log_lambda = self.param("log_lambda", nn.initializers.constant(jnp.log(self.init_lambda)), ())
            self.gate_logit = self.param("gate_logit", nn.initializers.zeros, ())

    @property
    def is_dual_encoder(self) -> bool:
        """Returns whether the score is the product of the pooled embeddings: without the internal step."""
        return not self.internal

    def transform_images(self, images: Features) -> Features:
        """Returns images enhanced by the external step."""
        if not self.cues:
            return images
        (visual, in_use), (textual, _) = self._nodes(images)
        return self.image_step(images, visual, textual, in_use)

    def transform_texts(self, texts: Features) -> Features:
        """Returns texts enhanced by the external step."""
        if not self.cues:
            return texts
        (visual, _), (textual, in_use) = self._nodes(texts)
        return self.text_step(texts, textual, visual, in_use)

    def _nodes(self, features: Features):
        width = features.pooled.shape[-1]
        return self.visual_nodes(width), self.textual_nodes(width)

    def score_products(self, products: Products, regions: RegionBlock, words: PaddedTexts | PackedTexts):
        """Returns the scores, float32 `(I, T)` (docs/method.md, Eqs. 88 to 92)."""
        if not self.internal:
            return products.pooled
        gate = nn.sigmoid(self.gate_logit)
        return (1 - gate) * products.pooled + gate * compare_contexts(products.S, regions, words, self._lambda)

    @property
    def _lambda(self):
        return limit_scale(self.log_lambda) if self.internal else self.init_lambda

    def attention(self, image: Features, text: Features):
        """Returns the attention of each word over the regions of one pair of enhanced items, float32 `(N, M)`; columns
        sum to 1. Without the internal step it is not trained."""
        mask = image.mask[:, None] & text.mask
        logits = jnp.where(image.mask[:, None], self._lambda * image.fragments @ text.fragments.T, MASKED_LOGIT)
        return jnp.where(mask, nn.softmax(logits, 0), 0.0)

    def scalars(self) -> dict:
        """Returns the learned scalars of the internal step by name, for logs."""
        return {"lambda": self._lambda, "gate": nn.sigmoid(self.gate_logit)} if self.internal else {}

    def initial_constants(self, images: Features, texts: Features, image_index, captions, seed) -> dict:
        """Returns the initial nodes and the edges of a training split (docs/method.md, Eqs. 80 to 82)."""
        if not self.cues:
            return {}
        number = self.concepts
        centroids = corpus.cluster_regions(images.fragments[images.mask], number, seed)
        words = corpus.frequent_words(captions, number)
        occurrences = corpus.Occurrences(
            corpus.mark_clusters(images.fragments, images.mask, centroids, number),
            corpus.mark_words(captions, words, number),
            image_index,
        )
        visual, textual = self._count_edges(occurrences, images, texts)
        visual_nodes = np.zeros((number, centroids.shape[1]), np.float32)
        visual_nodes[: len(centroids)] = centroids
        word_vectors = mean_pooled_of_words(texts.pooled, occurrences.captions)
        nodes = {"visual_nodes": {"initial": visual_nodes}, "textual_nodes": {"initial": word_vectors}}
        return nodes | {"image_step": visual, "text_step": textual}

    def _count_edges(self, occurrences: corpus.Occurrences, images: Features, texts: Features) -> tuple[dict, dict]:
        """Returns the edges of visual and of textual concepts by cue, float32 `(K, K)` each."""
        sides = {}, {}
        if "patch" in self.cues:
            for side, marks in zip(sides, (occurrences.images, occurrences.captions), strict=True):
                weights = corpus.weigh_edges(*corpus.count_within(marks))
                np.fill_diagonal(weights, 0)
                side["patch"] = corpus.keep_strongest(weights, self.edges)
        across = {"instance": None}
        if "neighbour" in self.cues:
            pooled = images.pooled, texts.pooled
            across["neighbour"] = corpus.nearest_images(*pooled, occurrences.image_index, self.neighbours)
        for cue, neighbours in across.items():
            if cue in self.cues:
                weights = corpus.weigh_edges(*corpus.count_across(occurrences, neighbours))
                for side, rows in zip(sides, (weights, weights.T), strict=True):
                    side[cue] = corpus.keep_strongest(rows, self.edges)
        return sides


def mean_pooled_of_words(pooled: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Returns a vector of each word, float32 `(K, D)`: the unit mean of the embeddings `pooled (C, D)` of the captions
    that have it, `marks (C, K)`, minus the mean of all; zero for a word that is in no caption, or in all."""
    total = marks.sum(0)[:, None]
    centered = marks.T @ pooled / np.maximum(total, 1) - (total > 0) * pooled.mean(0)
    lengths = np.linalg.norm(centered, axis=1, keepdims=True)
    return np.where(lengths > SMALLEST_MEAN, centered / np.maximum(lengths, SMALLEST_MEAN), 0).astype(np.float32)


def compare_contexts(S, regions: RegionBlock, words: PaddedTexts | PackedTexts, lam):
    """Computes the cosines `(I, T)` of two attended vectors, of the regions that a text's words attend to, and of the
    words that an image's regions attend to (docs/method.md, Eqs. 88 to 92), from the cosines `S (I, N, W)`."""
    E = jnp.where(regions.mask_for(words), jnp.exp(lam * S), 0.0)
    attended = words.sum(E * (1 / replace_zeros(jnp.sum(E, 1)))[:, None])  # d, (I, N, T), times the number of words
    described = jnp.sum(E * words.broadcast(1 / replace_zeros(words.sum(E))), 1)  # c, (I, W), times that of regions
    product = jnp.sum(attended * words.sum(S * described[:, None]), 1)
    product = product * inverse_sqrt(regions.squared_norms(attended), TINY)
    return product * inverse_sqrt(words.squared_norms(described), TINY)
