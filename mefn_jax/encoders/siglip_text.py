"""SigLIP's text tower (Zhai et al. 2023), also SigLIP 2's: a pre-norm Transformer without a mask. B texts."""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.encoders.transformer import Transformer


class SigLIPText(Transformer, kw_only=True):
    """SigLIP's text tower: token ids int32 and mask bool `(B, L)` -> `(hidden states (B, L, C), pooled (B, D))`.

    The tower was trained on captions padded to `max_positions` tokens, attends to the padding, and pools the state of
    the last position, whatever stands there. So it fills each caption up to that length itself: where `mask` is False,
    and from L on. `pooled` is that state after a linear layer, `head`.

    Attributes, beyond a Transformer's:
        vocab_size: rows of the word embedding.
        max_positions: rows of the position embedding, the length of all texts.
        pad_id: id of the token for padding.
        head_width: D, the width of `pooled`; 0 is C.
    """

    vocab_size: int
    max_positions: int
    pad_id: int
    head_width: int = 0
    activation: str = "gelu_pytorch_tanh"

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        def embed(num_rows, name):
            init = nn.initializers.normal(0.02)
            return nn.Embed(num_rows, self.width, embedding_init=init, dtype=self.dtype, name=name)

        length = ids.shape[1]
        ids = jnp.where(mask, ids, self.pad_id)
        ids = jnp.pad(ids, ((0, 0), (0, self.max_positions - length)), constant_values=self.pad_id)
        x = embed(self.vocab_size, "words")(ids) + embed(self.max_positions, "positions")(jnp.arange(ids.shape[1]))
        x = self.blocks(x, None, deterministic, pre_norm=True)
        x = nn.LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        pooled = nn.Dense(self.head_width or self.width, dtype=self.dtype, name="head")(x[:, -1])
        return x[:, :length], pooled
