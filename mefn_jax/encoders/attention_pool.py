"""Attention pooling of a ViT's patches, SigLIP's head (Zhai et al. 2022). B images, L patches, C width, H heads."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mefn_jax.encoders.transformer import ACTIVATIONS


class AttentionPool(nn.Module):
    """Attention pooling, `(B, L, C) -> (B, C)`: one learned query attends to all patches, and a two-layer MLP follows.

    Attributes:
        heads: H, the number of attention heads.
        mlp_width: hidden width of the MLP.
        eps: epsilon of the norm.
        activation: a name of ACTIVATIONS.
        dtype: of the computation.
    """

    heads: int
    mlp_width: int
    eps: float = 1e-6
    activation: str = "gelu"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        batch, _, width = x.shape
        size = width // self.heads
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width)).astype(x.dtype)

        def project(y, name):
            return nn.Dense(width, dtype=self.dtype, name=name)(y).reshape(len(y), -1, self.heads, size)

        q, k, v = project(probe, "query"), project(x, "key"), project(x, "value")
        logits = jnp.einsum("hc,blhc->bhl", q[0, 0], k, preferred_element_type=jnp.float32) / np.sqrt(size)
        pooled = jnp.einsum("bhl,blhc->bhc", nn.softmax(logits).astype(v.dtype), v).reshape(batch, width)
        pooled = nn.Dense(width, dtype=self.dtype, name="out")(pooled)
        y = nn.LayerNorm(self.eps, dtype=self.dtype, name="norm")(pooled)
        y = ACTIVATIONS[self.activation](nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")(y))
        return pooled + nn.Dense(width, dtype=self.dtype, name="mlp_out")(y)
