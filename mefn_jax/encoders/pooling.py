"""Fragments to one vector. B items, L fragments, C width; `mask` bool `(B, L)` says which fragments exist."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mefn_jax.encoders.gru import run_gru
from mefn_jax.encoders.positions import sines
from mefn_jax.encoders.transformer import MASKED_LOGIT

POOLINGS = ("mean", "max", "gpo")


def mean_pool(x, mask):
    """The mean of the existing fragments `(B, L, C) -> (B, C)`; 0 where there is none."""
    return jnp.sum(jnp.where(mask[..., None], x, 0.0), 1) / jnp.maximum(jnp.sum(mask, 1), 1)[:, None]


def max_pool(x, mask):
    """The largest value of the existing fragments in each dimension `(B, L, C) -> (B, C)`; 0 where there is none."""
    found = jnp.max(jnp.where(mask[..., None], x, MASKED_LOGIT), 1)
    return jnp.where(jnp.any(mask, 1)[:, None], found, 0.0)


class GPOWeights(nn.Module):
    """GPO's weights of the places of falling order: a softmax over a small GRU on the places' sine codes (our wave
    lengths, 6 to 600; theirs reach 60,000). `numbers` of fragments `(B,)` -> `(B, length)`, which sum to 1 over so many
    places and are 0 beyond."""

    width: int = 32
    temperature: float = 0.1

    @nn.compact
    def __call__(self, numbers, length: int):
        exists = jnp.arange(length) < numbers[:, None]
        codes = jnp.broadcast_to(sines(np.arange(length), self.width), (len(numbers), length, self.width))
        _, states = run_gru(codes, exists, self.width, True, "gru")
        logits = nn.Dense(1, use_bias=False, name="weight")(sum(states) / 2)[..., 0] / self.temperature
        return nn.softmax(jnp.where(exists, logits, MASKED_LOGIT)) * exists


class GPO(nn.Module):
    """Generalised pooling operator (VSE-infinity, Chen et al. 2021): each dimension's values in falling order, weighted
    by their place. The weights depend on the number of fragments and nothing else; mean and maximum are two cases.
    `(B, L, C), (B, L) -> (B, C)`."""

    @nn.compact
    def __call__(self, x, mask):
        weights = GPOWeights(name="places")(jnp.sum(mask, 1), x.shape[1])[..., None]  # (B, L, 1)
        ranked = -jnp.sort(-jnp.where(mask[..., None], x, MASKED_LOGIT), axis=1)
        return jnp.sum(weights * ranked, 1)  # what is missing comes last, with weight 0


class Pool(nn.Module):
    """Pools by one of POOLINGS `(B, L, C), (B, L) -> (B, C)`."""

    kind: str

    @nn.compact
    def __call__(self, x, mask):
        if self.kind == "gpo":
            return GPO(name="gpo")(x, mask)
        return {"mean": mean_pool, "max": max_pool}[self.kind](x, mask)
