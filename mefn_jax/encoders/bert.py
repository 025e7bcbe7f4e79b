"""BERT (Devlin et al. 2019): a post-norm Transformer over wordpieces. B texts, L positions, C width."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mefn_jax.encoders.positions import sines
from mefn_jax.encoders.transformer import Block


class BERT(nn.Module):
    """ids int32 and mask bool `(B, L)` -> `(hidden states float32 (B, L, C), pooled (B, C))`; L is at most
    `max_positions`. `pooled` is [CLS]'s state, with `pooler` after BERT's pooling layer."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    max_positions: int
    dropout: float = 0.0
    segments: int = 2
    pooler: bool = False
    activation: str = "gelu"
    eps: float = 1e-12

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        # BERT's own beginning, all three tables at 0.02, makes every position a random vector: in a short training from
        # scratch, attention then never learns what stands next to what. Sines say it from the start.
        x = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(1.0), name="words")(ids)
        positions = nn.Embed(self.max_positions, self.width, embedding_init=_sine_table, name="positions")
        x = x + positions(jnp.arange(ids.shape[1]))
        # Captions are one segment, yet BERT adds a segment embedding, and pretrained ones are not zero.
        segments = nn.Embed(self.segments, self.width, embedding_init=nn.initializers.normal(0.02), name="segments")
        x = x + segments(jnp.zeros_like(ids))
        x = nn.LayerNorm(self.eps, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
        for k in range(self.layers):
            block = Block(self.heads, self.mlp_width, False, self.dropout, self.eps, self.activation, name=f"layer_{k}")
            x = block(x, mask, deterministic)
        pooled = x[:, 0]
        return x, nn.tanh(nn.Dense(self.width, name="pooler")(pooled)) if self.pooler else pooled


def _sine_table(key, shape, dtype):
    return sines(np.arange(shape[0]), shape[1]).astype(dtype)
