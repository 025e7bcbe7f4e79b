"""SCAN's stacked cross attention (Lee et al. 2018), all pairs' scores without attended vectors.

Queries attend to sources: in "t2i" words attend to regions, in "i2t" regions to words. As in `gram.py`, the cosine of a
query and its attended vector comes from products of fragments alone. Words stand as in `sides.py`; letters as there.
"""

import jax
import jax.numpy as jnp

from mefn_jax.features import EPS, Features, unit
from mefn_jax.matching.gram import MAX_PLAIN_SCALE, normalize_product
from mefn_jax.matching.matcher import Matcher
from mefn_jax.scoring.layouts import PackedTexts, PaddedTexts, RegionBlock, region_block, to_padded

SLOPE = 0.1  # of the leaky ReLU


class SCAN(Matcher):
    """All pairs' scores, float32 `(I, T)`; no parameters.

    Attributes:
        direction: "t2i" or "i2t".
        aggregate: what becomes of the queries' cosines r: "lse", `ln(sum exp(sharpness r)) / sharpness`, which may
            exceed 1, or "avg", their mean.
        scale: lambda, the inverse temperature of the attention; up to 32 (the exponentials' squares fit into float32).
        sharpness: l of the log-sum-exp.
    """

    direction: str
    aggregate: str
    inverse_temperature: float
    lse_factor: float = 1.0

    def __call__(self, images: Features, texts: Features):
        return self.score_tile(region_block(images), to_padded(texts))

    def score_tile(self, regions: RegionBlock, words: PaddedTexts | PackedTexts):
        """The scores `(I, T)` of images and texts arranged for it."""
        if self.inverse_temperature > MAX_PLAIN_SCALE:
            raise ValueError(f"SCAN's scale {self.inverse_temperature} exceeds {MAX_PLAIN_SCALE}")
        S = words.products(regions.vectors)  # (I, N, W)
        leaky = jnp.where(S > 0, S, SLOPE * S)
        # Each source's row over the queries gets unit length; what is masked is zero and stays so.
        if self.direction == "t2i":
            rows = leaky * words.broadcast(_inverse_sqrt(words.sum(leaky * leaky)))
            rows = _stop_gradient_if_single(rows, words.broadcast(words.lengths()))
            alpha = jnp.where(regions.mask_for(words), jnp.exp(self.inverse_temperature * rows), 0.0)
            r = normalize_product(jnp.sum(alpha * S, 1), regions.squared_norms(alpha))  # (I, W)
            return self._aggregated(r, words.sum, words.lengths())
        rows = leaky * _inverse_sqrt(jnp.sum(leaky * leaky, 1))[:, None]
        rows = _stop_gradient_if_single(rows, jnp.sum(regions.mask, 1).reshape(-1, 1, *[1] * words.word_axes))
        alpha = jnp.exp(self.inverse_temperature * rows)
        r = normalize_product(words.sum(alpha * S), words.squared_norms(alpha))  # (I, N, T)
        there = regions.mask[..., None]
        return self._aggregated(r, lambda x: jnp.sum(jnp.where(there, x, 0.0), 1), jnp.sum(there, 1))

    def embed(self, features: Features):
        """The vector for shortlists `(B, D)`: the unit mean of the fragments, since `pooled` is not trained."""
        return unit(jnp.sum(features.fragments, 1))

    def _aggregated(self, r, over_queries, number):
        """The score `(I, T)` of the queries' cosines; `over_queries` sums over them."""
        if self.aggregate == "avg":
            return over_queries(r) / jnp.maximum(number, 1)
        total = over_queries(jnp.exp(self.lse_factor * r))
        return jnp.log(jnp.where(total > 0, total, 1.0)) / self.lse_factor


def _stop_gradient_if_single(rows, number):
    """Rows of unit length over `number` queries, without a gradient where there is one query: it leaves the sign alone,
    whose gradient would be nothing but rounding, the larger the smaller the cosine is."""
    return jnp.where(number > 1, rows, jax.lax.stop_gradient(rows))


def _inverse_sqrt(square):
    """One over the root, and 0, with gradient 0, of zero."""
    exists = square > EPS
    return jnp.where(exists, jax.lax.rsqrt(jnp.where(exists, square, 1.0)), 0.0)
