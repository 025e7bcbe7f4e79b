"""Token ids, or cached words, to Features: a backbone's hidden states become words, and a pooled embedding."""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.encoders.pooling import Pool
from mefn_jax.matching.features import make_features


class TextEncoder(nn.Module):
    """`[CLS] words [SEP] [PAD]...`, ids int32 and mask bool `(B, L)`, True from [CLS] to [SEP] -> Features: M = L - 2
    words and `pooled` in the joint space of `dim`.

    Attributes:
        backbone: a Linen module `(ids, mask, deterministic) -> (hidden states (B, L, C), pooled (B, C))`.
        dim: D, the width of the joint space; 0 for the backbone's own states as they are (VSE++'s and SCAN's GRU).
        pooling: what becomes `pooled`: "tower" for the backbone's own, else a name of `pooling.POOLINGS`, of words.
    """

    backbone: nn.Module
    dim: int
    pooling: str = "tower"

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        words, word_mask, pooled = self.states(ids, mask, deterministic)
        if self.dim:
            words = nn.Dense(self.dim, name="words")(words)
        if self.pooling != "tower":
            pooled = Pool(self.pooling, name="pooling")(words, word_mask)
        elif self.dim:
            pooled = nn.Dense(self.dim, name="pooled")(pooled)
        return make_features(words, word_mask, pooled)

    def states(self, ids, mask, deterministic=True):
        """The backbone's states before any projection: words `(B, M, C)`, their mask `(B, M)`, pooled `(B, C)`."""
        hidden, pooled = self.backbone(ids, mask, deterministic)
        # Dropping the first column and one more True leaves the words: [SEP] sits behind the last one.
        return hidden[:, 1:-1], mask[:, 2:], pooled


class CachedTextEncoder(nn.Module):
    """Words float `(B, M, C)` that a frozen tower has written, and their mask bool `(B, M)` -> Features.

    Attributes:
        dim: D, the width of the joint space.
        pooling: what becomes `pooled`: a name of `pooling.POOLINGS`, of the projected words.
    """

    dim: int
    pooling: str = "mean"

    @nn.compact
    def __call__(self, words, mask, deterministic=True):
        words = nn.Dense(self.dim, name="words")(jnp.where(mask[..., None], words, 0).astype(jnp.float32))
        return make_features(words, mask, Pool(self.pooling, name="pooling")(words, mask))
