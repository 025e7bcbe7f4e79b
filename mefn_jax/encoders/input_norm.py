"""A tower's states on their way into the joint space. B items, L fragments, C channels."""

import flax.linen as nn
import jax.numpy as jnp


class InputNorm(nn.Module):
    """Centres and scales the channels of `(B, L, C)` by stored statistics, which are constants (`start.py` sets them;
    without it they change nothing), and in training drops channels.

    Attributes:
        dropout: the chance that a channel is 0, in all fragments of an item at once.
    """

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, deterministic=True):
        mean = self.param("mean", nn.initializers.zeros, x.shape[-1:])
        var = self.param("var", nn.initializers.ones, x.shape[-1:])
        x = (x.astype(jnp.float32) - mean) / jnp.sqrt(var)
        return nn.Dropout(self.dropout, broadcast_dims=(1,), deterministic=deterministic)(x)
