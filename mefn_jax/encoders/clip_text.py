"""CLIP's text tower (Radford et al. 2021): a causal pre-norm Transformer. B texts, L positions, C width."""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.encoders.transformer import Transformer


class CLIPText(Transformer, kw_only=True):
    """CLIP's text tower: token ids int32 and mask bool `(B, L)` -> `(hidden states (B, L, C), pooled (B, C))`.

    `pooled` is the hidden state of the end of text, which is the last token that `mask` keeps. If a caption itself
    holds this token, it is the first of them, as in the original. As attention is causal, only the last token attends
    to all others.

    Attributes, beyond a Transformer's:
        vocab_size: rows of the word embedding.
        max_positions: rows of the position embedding, the largest L.
    """

    vocab_size: int
    max_positions: int
    activation: str = "quick_gelu"
    eps: float = 1e-5

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        def embed(num_rows, name):
            init = nn.initializers.normal(0.02)
            return nn.Embed(num_rows, self.width, embedding_init=init, dtype=self.dtype, name=name)

        x = embed(self.vocab_size, "words")(ids)
        x = x + embed(self.max_positions, "positions")(jnp.arange(ids.shape[1]))
        x = self.blocks(x, mask, deterministic, pre_norm=True, causal=True)
        x = nn.LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        last = jnp.take_along_axis(ids, jnp.sum(mask, 1, keepdims=True) - 1, 1)  # (B, 1)
        end_of_text = jnp.argmax(ids == last, 1)  # (B,)
        return x, jnp.take_along_axis(x, end_of_text[:, None, None], 1)[:, 0]
