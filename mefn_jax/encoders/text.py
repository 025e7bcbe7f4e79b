"""Token ids to Features: a backbone's hidden states become words, and a pooled embedding."""

import flax.linen as nn

from mefn_jax.matching.features import make_features


class TextEncoder(nn.Module):
    """`[CLS] words [SEP] [PAD]...` -> Features: M = L - 2 words and `pooled` in the joint space of `dim`.

    Takes ids int32 and mask bool `(B, L)`; the mask is True from [CLS] to [SEP].
    """

    backbone: nn.Module
    dim: int

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        x, pooled = self.backbone(ids, mask, deterministic)  # (B, L, C), (B, C)
        words = nn.Dense(self.dim, name="words")(x[:, 1:-1])
        # Dropping the first column and one more True leaves the words: [SEP] sits behind the last one.
        word_mask = mask[:, 2:]
        pooled = nn.Dense(self.dim, name="pooled")(pooled)
        return make_features(words, word_mask, pooled)
