"""BERT (Devlin et al. 2019): a post-norm Transformer over wordpieces. B texts, L positions, C width."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mefn_jax.encoders.positions import sines
from mefn_jax.encoders.transformer import Transformer


class BERT(Transformer, kw_only=True):
    """BERT: token ids int32 and mask bool `(B, L)` -> `(hidden states (B, L, C), pooled (B, C))`.

    `pooled` is the hidden state of [CLS].

    Attributes, beyond a Transformer's:
        vocab_size: rows of the word embedding.
        max_positions: rows of the position embedding, the largest L.
        type_vocab_size: rows of the segment embedding; only the first row is used.
        pooler: adds BERT's pooling layer, a tanh layer on `pooled`.
    """

    vocab_size: int
    max_positions: int
    type_vocab_size: int = 2
    pooler: bool = False
    eps: float = 1e-12

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        def embed(num_rows, init, name):
            return nn.Embed(num_rows, self.width, embedding_init=init, dtype=self.dtype, name=name)

        # BERT initializes all three tables with a deviation of 0.02, so that every position is a random vector. In a
        # short training from scratch, attention then never learns which tokens are neighbors. Sine codes encode
        # distance from the first step on.
        x = embed(self.vocab_size, nn.initializers.normal(1.0), "words")(ids)
        x = x + embed(self.max_positions, _init_sines, "positions")(jnp.arange(ids.shape[1]))
        # A caption is a single segment, but BERT adds its embedding all the same, and pretrained ones are not zero.
        x = x + embed(self.type_vocab_size, nn.initializers.normal(0.02), "segments")(jnp.zeros_like(ids))
        x = nn.LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
        x = self.blocks(x, mask, deterministic, pre_norm=False)
        pooled = x[:, 0]
        return x, nn.tanh(nn.Dense(self.width, dtype=self.dtype, name="pooler")(pooled)) if self.pooler else pooled


def _init_sines(key, shape, dtype):
    return sines(np.arange(shape[0]), shape[1]).astype(dtype)
