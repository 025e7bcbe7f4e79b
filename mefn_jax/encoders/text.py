"""Token ids, or cached words, to Features: a backbone's hidden states become words, and a pooled embedding."""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.encoders.input_norm import InputNorm
from mefn_jax.encoders.pooling import Pool, mean_pool
from mefn_jax.features import make_features


class TextEncoder(nn.Module):
    """`[CLS] words [SEP] [PAD]...`, ids int32 and mask bool `(B, L)`, True from [CLS] to [SEP] -> Features: M = L - 2
    words and `pooled` in the joint space of `dim`.

    Attributes:
        backbone: a Linen module `(ids, mask, deterministic) -> (hidden states (B, L, C), pooled (B, C))`.
        dim: D, the width of the joint space; 0 for the backbone's own states as they are (VSE++'s and SCAN's GRU).
        pooling: what becomes `pooled`: "tower" for the backbone's own, else a name of `pooling.POOLINGS`, of words.
        channel_dropout: the chance that a channel of all words of a text is dropped in training.
    """

    backbone: nn.Module
    dim: int
    pooling: str = "tower"
    channel_dropout: float = 0.0

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        words, word_mask, pooled = self.backbone_features(ids, mask, deterministic)
        if self.dim:
            words = InputNorm(self.channel_dropout, name="input_norm")(words, deterministic)
            words = nn.Dense(self.dim, name="words")(words)
        if self.pooling != "tower":
            pooled = Pool(self.pooling, name="pooling")(words, word_mask)
        elif self.dim:
            pooled = nn.Dense(self.dim, name="pooled")(pooled)
        return make_features(words, word_mask, pooled)

    def backbone_features(self, ids, mask, deterministic=True):
        """The backbone's states before any projection: words `(B, M, C)`, their mask `(B, M)`, pooled `(B, C)`."""
        hidden, pooled = self.backbone(ids, mask, deterministic)
        # Dropping the first column and one more True leaves the words: [SEP] sits behind the last one.
        return hidden[:, 1:-1], mask[:, 2:], pooled


class CachedTextEncoder(nn.Module):
    """Words float `(B, M, C)` that a frozen tower has written, and their mask bool `(B, M)` -> Features.

    Attributes:
        dim: D, the width of the joint space.
        pooling: what becomes `pooled`: a name of `pooling.POOLINGS`, of the projected words.
        channel_dropout: as for `TextEncoder`.
    """

    dim: int
    pooling: str = "mean"
    channel_dropout: float = 0.0

    @nn.compact
    def __call__(self, words, mask, deterministic=True):
        words, mask, _ = self.backbone_features(words, mask)
        words = InputNorm(self.channel_dropout, name="input_norm")(words, deterministic)
        words = nn.Dense(self.dim, name="words")(words)
        return make_features(words, mask, Pool(self.pooling, name="pooling")(words, mask))

    def backbone_features(self, words, mask, deterministic=True):
        """As of `TextEncoder`: the words as they are, zero where masked, and their mean."""
        words = jnp.where(mask[..., None], words, 0).astype(jnp.float32)
        return words, mask, mean_pool(words, mask)
