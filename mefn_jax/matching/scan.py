"""SCAN's stacked cross attention (Lee et al. 2018; docs/method.md, Eqs. 37 to 39), without attended vectors.

Queries attend to sources: in "t2i" words attend to regions, in "i2t" regions to words. As in `gram.py`, the cosine of a
query and its attended vector comes from products of fragments alone (Eqs. 29 and 30). Letters and word axes W are those
of `scoring/layouts.py`.
"""

import jax
import jax.numpy as jnp

from mefn_jax.features import EPS, Features, unit
from mefn_jax.matching.gram import MAX_PLAIN_SCALE, inverse_sqrt, normalize_product
from mefn_jax.matching.matcher import Matcher
from mefn_jax.scoring.layouts import PackedTexts, PaddedTexts, Products, RegionBlock, region_block, to_padded

SCAN_DIRECTIONS, AGGREGATES = ("t2i", "i2t"), ("lse", "avg")
SLOPE = 0.1  # of the leaky ReLU


class SCAN(Matcher, kw_only=True):
    """Matcher of SCAN: the scores of all pairs; no parameters (docs/method.md, Eqs. 37 to 39).

    Attributes:
        direction: "t2i" or "i2t".
        aggregate: how the score follows from the queries' cosines q: "lse", `ln(sum exp(f q)) / f`, which may exceed 1,
            or "avg", their mean.
        inverse_temperature: lambda of the attention, at most MAX_PLAIN_SCALE (the exponentials' squares fit float32).
        lse_factor: f, the sharpness of the log-sum-exp.
    """

    direction: str = "t2i"
    aggregate: str = "lse"
    inverse_temperature: float = 9.0
    lse_factor: float = 6.0

    def score_products(self, products: Products, regions: RegionBlock, words: PaddedTexts | PackedTexts):
        """Returns the scores `(I, T)`. Raises ValueError if lambda exceeds MAX_PLAIN_SCALE."""
        if self.inverse_temperature > MAX_PLAIN_SCALE:
            raise ValueError(
                f"SCAN: inverse_temperature={self.inverse_temperature} exceeds {MAX_PLAIN_SCALE}; lower it"
            )
        S = products.S  # (I, N, W)
        weights = self._attention_weights(S, regions, words)  # (I, N, W)
        if self.direction == "t2i":
            q = normalize_product(jnp.sum(weights * S, 1), regions.squared_norms(weights))  # (I, W)
            return self._aggregate_cosines(q, words.sum, words.lengths())
        q = normalize_product(words.sum_unmasked(weights * S), words.squared_norms(weights))  # (I, N, T)
        mask = regions.mask[..., None]
        return self._aggregate_cosines(q, lambda x: jnp.sum(jnp.where(mask, x, 0.0), 1), jnp.sum(mask, 1))

    def _attention_weights(self, S, regions: RegionBlock, words: PaddedTexts | PackedTexts):
        """Returns the attention without its denominators, `(I, N, W)`: alpha of Eq. 37 or beta of Eq. 38. Each source's
        row over the queries is scaled to unit length first; masked entries are zero and stay zero."""
        leaky = jnp.where(S > 0, S, SLOPE * S)
        if self.direction == "t2i":
            e = leaky * words.broadcast(inverse_sqrt(words.sum_unmasked(leaky * leaky), EPS))
            e = _stop_gradient_if_single(e, words.broadcast(words.lengths()))
            return jnp.exp(self.inverse_temperature * e + regions.log_mask_for(words))
        e = leaky * inverse_sqrt(jnp.sum(leaky * leaky, 1), EPS)[:, None]
        e = _stop_gradient_if_single(e, jnp.sum(regions.mask, 1).reshape(-1, 1, *[1] * words.word_axes))
        return jnp.exp(self.inverse_temperature * e)

    def attention(self, image: Features, text: Features):
        """Returns the attention of each word over the regions of one pair, float32 `(N, M)`; columns sum to 1.

        In t2i it is the softmax over the regions of docs/method.md, Eq. 37. In i2t, the attention of the regions to a
        word (Eq. 38) is divided by its sum over the regions.
        """
        image, text = (jax.tree.map(lambda x: x[None], features) for features in (image, text))
        regions, words = region_block(image), to_padded(text)
        S = words.multiply(regions, with_pooled=False).S
        weights = self._attention_weights(S, regions, words)[0, ..., 0]  # (N, M)
        weights = jnp.where(image.mask[0][:, None] & text.mask[0], weights, 0.0)
        total = jnp.sum(weights, 0)
        return weights / jnp.where(total > 0, total, 1.0)

    def embed(self, features: Features):
        """Returns one vector for each item, `(B, D)`, for candidates and indexes: the unit mean of the fragments, since
        `pooled` is not trained."""
        return unit(jnp.sum(features.fragments, 1))

    def _aggregate_cosines(self, q, sum_queries, num_queries):
        """Returns the scores `(I, T)` from the queries' cosines `q`; `sum_queries` sums over the queries of a pair
        (docs/method.md, Eq. 39)."""
        if self.aggregate == "avg":
            return sum_queries(q) / jnp.maximum(num_queries, 1)
        total = sum_queries(jnp.exp(self.lse_factor * q))
        return jnp.log(jnp.where(total > 0, total, 1.0)) / self.lse_factor


def _stop_gradient_if_single(rows, num_queries):
    """Stops the gradient of rows with a single query: L2-normalizing one number leaves +1 or -1, so the true gradient
    is 0 and the computed one is rounding noise, larger for smaller cosines."""
    return jnp.where(num_queries > 1, rows, jax.lax.stop_gradient(rows))
