"""Poolings of fragments to one vector (docs/method.md, Eqs. 8 to 10, and 93).

B items, L fragments, C width; `mask` bool `(B, L)` marks the fragments that exist.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mefn_jax.encoders.gru import run_gru
from mefn_jax.encoders.positions import sines
from mefn_jax.features import MASKED_LOGIT


def mean_pool(x, mask):
    """Returns the mean of the existing fragments, `(B, L, C) -> (B, C)` (docs/method.md, Eq. 8); 0 for an item without
    fragments."""
    return jnp.sum(jnp.where(mask[..., None], x, 0.0), 1) / jnp.maximum(jnp.sum(mask, 1), 1)[:, None]


def max_pool(x, mask):
    """Returns the largest value of the existing fragments in each dimension, `(B, L, C) -> (B, C)` (docs/method.md,
    Eq. 9); 0 for an item without fragments."""
    largest = jnp.max(jnp.where(mask[..., None], x, MASKED_LOGIT), 1)
    return jnp.where(jnp.any(mask, 1)[:, None], largest, 0.0)


class GPOWeights(nn.Module):
    """Rank weights of GPO (docs/method.md, Eq. 10): a softmax over a small GRU that reads sine codes of the ranks.

    Numbers of fragments `(B,)` -> weights `(B, length)`, which sum to 1 over the existing ranks and are 0 beyond them.
    The codes have wavelengths 6 to 600; those of the paper reach 60,000.
    """

    width: int = 32
    temperature: float = 0.1

    @nn.compact
    def __call__(self, num_fragments, length: int):
        exists = jnp.arange(length) < num_fragments[:, None]
        codes = jnp.broadcast_to(sines(np.arange(length), self.width), (len(num_fragments), length, self.width))
        _, states = run_gru(codes, exists, self.width, True, "gru")
        logits = nn.Dense(1, use_bias=False, name="weight")(sum(states) / 2)[..., 0] / self.temperature
        return nn.softmax(jnp.where(exists, logits, MASKED_LOGIT)) * exists


class GPO(nn.Module):
    """Generalized pooling operator (VSE-infinity, Chen et al. 2021; docs/method.md, Eq. 10).

    `(B, L, C), (B, L) -> (B, C)`: sorts the values of each dimension from large to small and weights them by rank. The
    weights depend on the number of fragments alone. Mean and maximum are two cases of it.
    """

    @nn.compact
    def __call__(self, x, mask):
        weights = GPOWeights(name="places")(jnp.sum(mask, 1), x.shape[1])[..., None]  # (B, L, 1)
        sorted_values = -jnp.sort(-jnp.where(mask[..., None], x, MASKED_LOGIT), axis=1)
        return jnp.sum(weights * sorted_values, 1)  # missing fragments come last and have weight 0


class ESA(nn.Module):
    """Attention over the fragments in each dimension (ESA, Zhu et al. 2023; docs/method.md, Eq. 93).

    `(B, L, C), (B, L) -> (B, C)`: each dimension of a fragment has a weight, a softmax over the fragments of a linear
    map of them. With a map of zeros it is the mean. 0 for an item without fragments.
    """

    @nn.compact
    def __call__(self, x, mask):
        x, exists = jnp.where(mask[..., None], x, 0.0), mask[..., None]
        logits = nn.Dense(x.shape[-1], kernel_init=nn.initializers.xavier_uniform(), name="attention")(x)  # (B, L, C)
        weights = nn.softmax(jnp.where(exists, logits, MASKED_LOGIT), axis=1)
        return jnp.sum(weights * x, 1)


POOLING_FUNCTIONS = {"mean": mean_pool, "max": max_pool}
POOLING_MODULES = {"gpo": GPO, "esa": ESA}  # these have parameters
POOLINGS = (*POOLING_FUNCTIONS, *POOLING_MODULES)


class Pool(nn.Module):
    """Pooling of `kind`, a name of POOLINGS: `(B, L, C), (B, L) -> (B, C)`."""

    kind: str

    @nn.compact
    def __call__(self, x, mask):
        if self.kind in POOLING_FUNCTIONS:
            return POOLING_FUNCTIONS[self.kind](x, mask)
        return POOLING_MODULES[self.kind](name=self.kind)(x, mask)
