"""CLIP's text tower (Radford et al. 2021): a causal pre-norm Transformer. B texts, L positions, C width."""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.encoders.transformer import Block


class CLIPText(nn.Module):
    """ids int32 and mask bool `(B, L)` -> `(hidden states float32 (B, L, C), pooled (B, C))`; L is at most
    `max_positions`. `pooled` is the state of the mask's last token, the end of text, which sees all others."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    max_positions: int
    dropout: float = 0.0
    activation: str = "quick_gelu"
    eps: float = 1e-5

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        init = nn.initializers.normal(0.02)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="words")(ids)
        positions = nn.Embed(self.max_positions, self.width, embedding_init=init, name="positions")
        x = x + positions(jnp.arange(ids.shape[1]))
        for k in range(self.layers):
            block = Block(
                self.heads, self.mlp_width, True, self.dropout, self.eps, self.activation, True, name=f"layer_{k}"
            )
            x = block(x, mask, deterministic)
        x = nn.LayerNorm(self.eps, name="norm")(x)
        last = jnp.sum(mask, 1) - 1  # (B,)
        return x, jnp.take_along_axis(x, last[:, None, None], 1)[:, 0]
