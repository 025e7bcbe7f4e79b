"""VisITA's matcher (Wang et al. 2024) as read in docs/method.md, section 16: attention in both directions and several
steps, between fragments and between groups of them, compared through several kernels.

As in `gram.py`, no attended vector is formed. *Queries* (words or regions) attend to *sources* (the other kind), so
each formula is written once for both directions. Letters and word axes W are those of `scoring/layouts.py`; G groups.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mefn_jax.features import Features, unit
from mefn_jax.matching.gram import TINY, inverse_sqrt, limit_scale, normalize_product
from mefn_jax.matching.matcher import Matcher
from mefn_jax.scoring.layouts import (
    PackedTexts,
    PaddedTexts,
    Products,
    RegionBlock,
    region_block,
    replace_zeros,
    to_padded,
)

LEVELS = ("fragments", "groups", "whole")
# A refined query whose squared length is at most this counts as zero: it is a difference of numbers known to 1e-7.
SMALLEST_REFINED = 1e-6


class SourceSide(NamedTuple):
    """Fragments of one kind that those of the other kind attend to.

    Attributes:
        sum: sums an array `(I, N, W)` over the sources of each query, to one value per query.
        broadcast: gives each pair of query and source, `(I, N, W)` or what broadcasts to it, the value of its query.
        multiply_gram: multiplies weights `(I, N, W)` by the sources' Gram matrix.
        squared_norms: returns the squared lengths of the sums of sources with weights `(I, N, W)`.
    """

    sum: Callable
    broadcast: Callable
    multiply_gram: Callable
    squared_norms: Callable


class Prototypes(nn.Module):
    """Learned prototypes of groups: vectors `(..., D)` -> their cosines with `number` prototypes, `(..., number)`."""

    number: int

    @nn.compact
    def __call__(self, vectors):
        prototypes = self.param("vectors", nn.initializers.normal(1.0), (self.number, vectors.shape[-1]))
        return vectors @ unit(prototypes).T


class VisITA(Matcher, kw_only=True):
    """Matcher of VisITA: the scores of all pairs, at most 1 (docs/method.md, Eqs. 67 to 78).

    Attributes:
        levels: names of LEVELS that are compared: fragments, groups of fragments, and pooled embeddings.
        steps: number of attention steps between fragments; in all but the first, queries are refined.
        groups: number of groups a side.
        kernels: squared widths of the radial kernels beside the linear one; (): the linear one alone.
        attend: "both", "t2i" (words attend to regions) or "i2t" (regions attend to words).
        init_lambda: initial inverse temperature of the attention, learned as a logarithm; at most 32 is used.
        init_eta: initial inverse temperature with which fragments choose their groups, as `init_lambda`.
    """

    levels: tuple[str, ...] = LEVELS
    steps: int = 2
    groups: int = 4
    kernels: tuple[float, ...] = (0.25, 1.0)
    attend: str = "both"
    init_lambda: float = 9.0
    init_eta: float = 5.0

    def setup(self):
        """Creates the learned scalars and prototypes. Parameters without effect on the score are not created."""
        constant, zeros = nn.initializers.constant, nn.initializers.zeros
        if self._attends:
            self.log_lambda = self.param("log_lambda", constant(jnp.log(self.init_lambda)), ())
        if "groups" in self.levels:
            self.log_eta = self.param("log_eta", constant(jnp.log(self.init_eta)), ())
            self.region_prototypes, self.word_prototypes = Prototypes(self.groups), Prototypes(self.groups)
        if self.kernels:
            shape = (1 + len(self.kernels),)
            self.kernel_logits = {level: self.param(f"{level}_kernels", zeros, shape) for level in self.levels}
        if self._num_terms > 1:
            self.term_logits = self.param("term_logits", zeros, (self._num_terms,))

    @property
    def _attends(self) -> bool:
        return "fragments" in self.levels or "groups" in self.levels

    @property
    def _num_terms(self) -> int:
        """Returns the number of similarities whose weighted mean is the score."""
        return len(self.levels) + ("fragments" in self.levels) * (self.steps - 1)

    @property
    def lam(self):
        """Returns lambda, the inverse temperature of the attention."""
        return limit_scale(self.log_lambda) if self._attends else self.init_lambda

    def project_regions(self, vectors):
        """Returns the cosines of regions `(..., D)` with the prototypes of their groups, `(..., G)`."""
        return self.region_prototypes(vectors) if "groups" in self.levels else None

    def project_words(self, vectors):
        """Returns the cosines of words `(..., D)` with the prototypes of their groups, `(..., G)`."""
        return self.word_prototypes(vectors) if "groups" in self.levels else None

    def score_products(self, products: Products, regions: RegionBlock, words: PaddedTexts | PackedTexts):
        """Returns the scores, float32 `(I, T)` (docs/method.md, Eq. 78)."""
        terms = []
        if "fragments" in self.levels:
            terms += self._compare("fragments", self.steps, products.S, regions, words)
        if "groups" in self.levels:
            terms += self._compare("groups", 1, *form_groups(products.S, regions, words, limit_scale(self.log_eta)))
        if "whole" in self.levels:
            terms.append(self._apply_kernels("whole", products.pooled))
        shares = nn.softmax(self.term_logits) if self._num_terms > 1 else [1.0]
        return sum(share * term for share, term in zip(shares, terms, strict=True))

    def _compare(self, level: str, steps: int, S, regions: RegionBlock, words: PaddedTexts | PackedTexts) -> list:
        """Returns the similarities `(I, T)` of the steps, means of the evidence of all queries (docs/method.md,
        Eq. 76)."""
        region_sources, word_sources = regions_as_sources(regions), words_as_sources(words)
        directions = []
        if self.attend in ("both", "t2i"):
            evidence, count = attend(S, region_sources, self.lam, steps)[0], jnp.maximum(words.lengths(), 1)
            directions.append([words.sum(self._apply_kernels(level, r)) / count for r in evidence])
        if self.attend in ("both", "i2t"):
            evidence = attend(S, word_sources, self.lam, steps)[0]  # (I, N, T) each
            count = jnp.maximum(jnp.sum(regions.mask, 1), 1)[:, None]
            directions.append([region_sources.sum(self._apply_kernels(level, q)) / count for q in evidence])
        return [sum(step) / len(step) for step in zip(*directions, strict=True)]

    def _apply_kernels(self, level: str, cosines):
        """Returns the mixture of kernels of cosines (docs/method.md, Eq. 75)."""
        if not self.kernels:
            return cosines
        linear, *radial = nn.softmax(self.kernel_logits[level])
        pairs = zip(radial, self.kernels, strict=True)
        return linear * cosines + sum(share * jnp.exp((cosines - 1) / width) for share, width in pairs)

    def attention(self, image: Features, text: Features):
        """Returns the attention of each word over the regions of one pair in the last step, float32 `(N, M)`; columns
        sum to 1. With `attend="i2t"`, the regions' attention to a word is divided by its sum over the regions."""
        image, text = (jax.tree.map(lambda x: x[None], features) for features in (image, text))
        regions, words = region_block(image), to_padded(text)
        S = words.multiply(regions, with_pooled=False).S
        sources = words_as_sources(words) if self.attend == "i2t" else regions_as_sources(regions)
        weights = attend(S, sources, self.lam, self.steps)[1]
        weights = (weights / sources.broadcast(replace_zeros(sources.sum(weights))))[0, ..., 0]  # (N, M)
        weights = jnp.where(image.mask[0][:, None] & text.mask[0], weights, 0.0)
        return weights / replace_zeros(jnp.sum(weights, 0))

    def scalars(self) -> dict:
        """Returns the learned inverse temperatures by name, for logs."""
        values = {"lambda": self.lam} if self._attends else {}
        return values | ({"eta": limit_scale(self.log_eta)} if "groups" in self.levels else {})

    def embed(self, features: Features):
        """Returns one vector for each item, `(B, D)`, for candidates and indexes: the pooled embedding, or the unit
        mean of the fragments where the pooled embedding is not trained."""
        return features.pooled if "whole" in self.levels else unit(jnp.sum(features.fragments, 1))


def regions_as_sources(regions: RegionBlock) -> SourceSide:
    """Returns the regions of images as sources of words."""

    def sum_regions(x):
        mask = regions.mask.reshape(*regions.mask.shape, *[1] * (x.ndim - 2))
        return jnp.sum(jnp.where(mask, x, 0.0), 1)

    return SourceSide(sum_regions, lambda y: y[:, None], regions.multiply_gram, regions.squared_norms)


def words_as_sources(words: PaddedTexts | PackedTexts) -> SourceSide:
    """Returns the words of texts as sources of regions."""
    return SourceSide(words.sum, words.broadcast, words.multiply_gram, words.squared_norms)


def attend(S, sources: SourceSide, lam, steps: int) -> tuple[list, jax.Array]:
    """Computes the evidence of each query in each step: the cosine of the query and its attended vector
    (docs/method.md, Eqs. 67 to 72).

    Returns the evidence, `steps` arrays with a value for each query, and the last step's attention without its
    denominators, `(I, N, W)`; masked entries are arbitrary. `S (I, N, W)` are the cosines.
    """
    logits, evidence = S, []
    for step in range(steps):
        weights = jnp.exp(lam * logits)
        product = sources.sum(weights * S)
        if step == steps - 1:
            evidence.append(normalize_product(product, sources.squared_norms(weights)))
            continue
        attended = sources.multiply_gram(weights)  # products of the attended vectors with all sources
        square, total = sources.sum(weights * attended), replace_zeros(sources.sum(weights))
        evidence.append(normalize_product(product, square))
        # The attended vector is added to the query: |t + a|^2 = 1 + 2 t . a + a . a
        inverse_length = inverse_sqrt(1 + 2 * product / total + square / total**2, SMALLEST_REFINED)
        logits = S * sources.broadcast(inverse_length) + attended * sources.broadcast(inverse_length / total)
    return evidence, weights


def form_groups(S, regions: RegionBlock, words: PaddedTexts | PackedTexts, eta):
    """Forms G groups of regions and G groups of words, whose vectors are softmax-weighted means of fragments
    (docs/method.md, Eq. 77). Returns their cosines `(I, G, G, T)` and their layouts, in the form of `S`, `regions` and
    `words`: a group takes the place of a fragment."""
    region_sources = regions_as_sources(regions)
    P_v, P_t = jnp.exp(eta * regions.projections), jnp.exp(eta * words.projections)  # (I, N, G), (G, W)
    P_v = jnp.where(regions.mask[..., None], P_v, 0.0) / replace_zeros(region_sources.sum(P_v))[:, None]
    P_t = P_t * words.broadcast(1 / replace_zeros(words.sum(P_t)))
    gram_v = jnp.einsum("ing,inh->igh", P_v, jnp.matmul(regions.gram, P_v))
    gram_t = words.sum(words.multiply_gram(P_t)[:, None] * P_t)  # (G, G, T)
    S = words.sum(jnp.einsum("ing,in...->ig...", P_v, S)[:, :, None] * P_t)
    length_v = inverse_sqrt(jnp.diagonal(gram_v, axis1=1, axis2=2), TINY)  # (I, G)
    length_t = inverse_sqrt(jnp.diagonal(gram_t).T, TINY)  # (G, T)
    regions = RegionBlock(
        None, None, jnp.ones(length_v.shape, bool), gram_v * length_v[:, None] * length_v[..., None], None, None
    )
    words = PaddedTexts(None, None, jnp.ones(length_t.shape, bool), gram_t * length_t[:, None] * length_t, None, None)
    return S * length_v[..., None, None] * length_t, regions, words
