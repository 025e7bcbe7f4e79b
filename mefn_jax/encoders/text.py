"""Text encoders: token ids or cached text to Features. Hidden states become words, and there is a pooled embedding."""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.encoders.input_norm import InputNorm
from mefn_jax.encoders.pooling import Pool, mean_pool
from mefn_jax.features import make_features


class TextEncoder(nn.Module):
    """Text encoder: token ids int32 `(B, L)` and mask bool `(B, L)` -> Features of M words.

    A row of ids is `[CLS] words [SEP] [PAD]...` with M = L - 2, or `words [SEP] [PAD]...` with M = L - 1 without a
    start token; its mask is True up to [SEP]. Whether it attends to the padding is the tower's own matter
    (docs/towers.md). Words are projected by docs/method.md, Eq. 7.

    Attributes:
        backbone: a Linen module `(ids, mask, deterministic) -> (hidden states (B, L, C), pooled (B, C))`.
        dim: D, the width of the joint space; 0 takes the backbone's states without a projection (VSE++'s and SCAN's
            GRU).
        pooling: source of `pooled`: "tower" for the backbone's own pooled state, or a name of `pooling.POOLINGS` for a
            pooling of the words.
        channel_dropout: probability that a channel is dropped in training, in all words of a text at once.
        start_token: captions begin with [CLS].
    """

    backbone: nn.Module
    dim: int
    pooling: str = "tower"
    channel_dropout: float = 0.0
    start_token: bool = True

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
        """Returns the backbone's states before any projection: words `(B, M, C)`, their mask `(B, M)`, pooled
        `(B, C)`."""
        hidden, pooled = self.backbone(ids, mask, deterministic)
        first = int(self.start_token)
        # Word m is token m + first. It exists if the token after it does, which is at the latest [SEP].
        return hidden[:, first:-1], mask[:, first + 1 :], pooled


class CachedTextEncoder(nn.Module):
    """Encoder of cached text: words float `(B, M, C)` of a frozen tower, and their mask bool `(B, M)` -> Features.

    Attributes:
        dim: D, the width of the joint space.
        pooling: a name of `pooling.POOLINGS`, applied to the projected words.
        channel_dropout: as in `TextEncoder`.
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
        """Returns the words as they are but zero where masked, their mask, and their mean `(B, C)` as `pooled`."""
        words = jnp.where(mask[..., None], words, 0).astype(jnp.float32)
        return words, mask, mean_pool(words, mask)
