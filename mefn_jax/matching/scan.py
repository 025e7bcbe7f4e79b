"""SCAN's stacked cross attention (Lee et al. 2018), all pairs' scores without attended vectors.

Queries attend to sources: in "t2i" words attend to regions, in "i2t" regions to words. As in `gram.py`, the cosine of a
query and its attended vector comes from products of fragments alone. Letters: I images, T texts, N regions, M words,
K sources, Q queries, D dimensions.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mefn_jax.matching.features import Features, unit
from mefn_jax.matching.gram import attention, cosine

SLOPE = 0.1  # of the leaky ReLU


class SCAN(nn.Module):
    """All pairs' scores, float32 `(I, T)`; no parameters.

    Attributes:
        direction: "t2i" or "i2t".
        aggregate: what becomes of the queries' cosines r: "lse", `ln(sum exp(sharpness r)) / sharpness`, which may
            exceed 1, or "avg", their mean.
        scale: lambda, the inverse temperature of the attention.
        sharpness: l of the log-sum-exp.
    """

    direction: str
    aggregate: str
    scale: float
    sharpness: float = 1.0

    def __call__(self, images: Features, texts: Features):
        S = jnp.einsum("ind,tmd->itnm", images.fragments, texts.fragments)
        v_mask, t_mask = images.mask[:, None], texts.mask[None]  # (I, 1, N), (1, T, M)
        if self.direction == "t2i":
            r = self._cosines(S, v_mask, t_mask, images.fragments, "i")
            return self._aggregated(r, t_mask)
        r = self._cosines(jnp.swapaxes(S, 2, 3), t_mask, v_mask, texts.fragments, "t")
        return self._aggregated(r, v_mask)

    def coarse(self, features: Features):
        """The vector for shortlists `(B, D)`: the unit mean of the fragments, since `pooled` is not trained."""
        return unit(jnp.sum(features.fragments, 1))

    def _cosines(self, S, sources, queries, vectors, owner: str):
        """Each query's cosine with what it attends to, `(I, T, Q)`. `S (I, T, K, Q)` are cosines, `sources`, `queries`
        their masks, `vectors (B, K, D)` the sources, which belong to `owner`, "i"mages or "t"exts."""
        # Each source's row over the queries gets unit length; what is masked is zero and stays so.
        clipped = unit(jnp.where(S > 0, S, SLOPE * S))
        mask = jnp.broadcast_to(sources[..., :, None] & queries[..., None, :], S.shape)
        alpha = attention(self.scale * clipped, mask, axis=2)
        gram = jnp.einsum("bkd,bld->bkl", vectors, vectors)
        square = jnp.sum(alpha * jnp.einsum(f"itkq,{owner}kl->itlq", alpha, gram), 2)
        return cosine(jnp.sum(alpha * S, 2), square)

    def _aggregated(self, r, queries):
        """The score `(I, T)` of cosines `r (I, T, Q)`."""
        if self.aggregate == "avg":
            return jnp.sum(jnp.where(queries, r, 0.0), -1) / jnp.maximum(jnp.sum(queries, -1), 1)
        logits = jnp.where(queries, self.sharpness * r, -1e30)
        return jax.nn.logsumexp(logits, axis=-1) / self.sharpness
