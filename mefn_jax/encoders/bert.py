"""BERT (Devlin et al. 2019): a post-norm Transformer over wordpieces. B texts, L positions, C width."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mefn_jax.encoders.positions import sines
from mefn_jax.encoders.transformer import Transformer


class BERT(Transformer, kw_only=True):
    """ids int32 and mask bool `(B, L)` -> `(hidden states (B, L, C), pooled (B, C))`; L is at most `max_positions`.
    `pooled` is [CLS]'s state, with `pooler` after BERT's pooling layer. `segments` are the rows of the segment
    embedding, of which the first is used."""

    vocab_size: int
    max_positions: int
    type_vocab_size: int = 2
    pooler: bool = False
    eps: float = 1e-12

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        def embed(number, init, name):
            return nn.Embed(number, self.width, embedding_init=init, dtype=self.dtype, name=name)

        # BERT's own beginning, all three tables at 0.02, makes every position a random vector: in a short training from
        # scratch, attention then never learns what stands next to what. Sines say it from the start.
        x = embed(self.vocab_size, nn.initializers.normal(1.0), "words")(ids)
        x = x + embed(self.max_positions, _sine_table, "positions")(jnp.arange(ids.shape[1]))
        # Captions are one segment, yet BERT adds a segment embedding, and pretrained ones are not zero.
        x = x + embed(self.type_vocab_size, nn.initializers.normal(0.02), "segments")(jnp.zeros_like(ids))
        x = nn.LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
        x = self.blocks(x, mask, deterministic, pre_norm=False)
        pooled = x[:, 0]
        return x, nn.tanh(nn.Dense(self.width, dtype=self.dtype, name="pooler")(pooled)) if self.pooler else pooled


def _sine_table(key, shape, dtype):
    return sines(np.arange(shape[0]), shape[1]).astype(dtype)
