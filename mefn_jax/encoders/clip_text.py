"""CLIP's text tower (Radford et al. 2021): a causal pre-norm Transformer. B texts, L positions, C width."""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.encoders.transformer import Transformer


class CLIPText(Transformer, kw_only=True):
    """ids int32 and mask bool `(B, L)` -> `(hidden states (B, L, C), pooled (B, C))`; L is at most `max_positions`.
    `pooled` is the state of the mask's last token, the end of text, which sees all others."""

    vocab_size: int
    max_positions: int
    activation: str = "quick_gelu"
    eps: float = 1e-5

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        def embed(number, name):
            init = nn.initializers.normal(0.02)
            return nn.Embed(number, self.width, embedding_init=init, dtype=self.dtype, name=name)

        x = embed(self.vocab_size, "words")(ids)
        x = x + embed(self.max_positions, "positions")(jnp.arange(ids.shape[1]))
        x = self.blocks(x, mask, deterministic, pre_norm=True, causal=True)
        x = nn.LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        last = jnp.sum(mask, 1) - 1  # (B,)
        return x, jnp.take_along_axis(x, last[:, None, None], 1)[:, 0]
