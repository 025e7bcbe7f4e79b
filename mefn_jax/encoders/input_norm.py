"""Normalization of a tower's states before the projection into the joint space. B items, L fragments, C channels."""

import flax.linen as nn
import jax.numpy as jnp


class InputNorm(nn.Module):
    """Input norm (docs/method.md, Eq. 5): centers and scales the channels of `(B, L, C)`, in training also drops some.

    Mean and variance are stored constants. They are 0 and 1, which changes nothing, unless `training/cca_init.py` sets
    them.

    Attributes:
        dropout: probability that a channel is set to 0, in all fragments of an item at once.
    """

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, deterministic=True):
        mean = self.variable("constants", "mean", jnp.zeros, x.shape[-1:]).value
        var = self.variable("constants", "var", jnp.ones, x.shape[-1:]).value
        x = (x.astype(jnp.float32) - mean) / jnp.sqrt(var)
        return nn.Dropout(self.dropout, broadcast_dims=(1,), deterministic=deterministic)(x)
