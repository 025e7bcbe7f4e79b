"""BERT (Devlin et al. 2019): a post-norm Transformer over wordpieces, and its relatives. B texts, L positions, C width.

RoBERTa and XLM-R count positions from the padding's id on (`pad_id`), and DistilBERT has no segments and no pooler.
"""

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
        type_vocab_size: rows of the segment embedding; only the first row is used. 0: there is none.
        pad_id: id of the token for padding, after which positions are counted, as in RoBERTa: the first token that is
            not padding has position `pad_id + 1`; -1 counts all tokens from 0 on, as in BERT.
        distance_buckets: rows of a table of biases that are added to attention by the distance of two tokens, as in
            MPNet (Song et al. 2020); 0: there is none.
        pooler: adds BERT's pooling layer, a tanh layer on `pooled`.
    """

    vocab_size: int
    max_positions: int
    type_vocab_size: int = 2
    pad_id: int = -1
    distance_buckets: int = 0
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
        x = x + embed(self.max_positions, _init_sines, "positions")(count_positions(ids, self.pad_id))
        if self.type_vocab_size:
            # A caption is a single segment, but BERT adds its embedding all the same, and pretrained ones are not zero.
            x = x + embed(self.type_vocab_size, nn.initializers.normal(0.02), "segments")(jnp.zeros_like(ids))
        # Named "norm" where there are segments, because stored runs have that name; layer decay (`optim.py`) tells by
        # the segments that this norm comes before the layers.
        x = nn.LayerNorm(self.eps, dtype=self.dtype, name="norm" if self.type_vocab_size else "embed_norm")(x)
        x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
        bias = None
        if self.distance_buckets:
            buckets = count_distance_buckets(ids.shape[1], self.distance_buckets)
            init = nn.initializers.normal(0.02)
            bias = nn.Embed(self.distance_buckets, self.heads, embedding_init=init, name="distances")(buckets)
            bias = bias.transpose(2, 0, 1)  # (H, L, L)
        x = self.blocks(x, mask, deterministic, bias=bias, pre_norm=False)
        pooled = x[:, 0]
        return x, nn.tanh(nn.Dense(self.width, dtype=self.dtype, name="pooler")(pooled)) if self.pooler else pooled


def count_positions(ids, pad_id: int):
    """Returns the row of the position embedding of each token, int32 `(B, L)`, or `(L,)` if all texts have the same
    (see `BERT.pad_id`). A token that is padding has row `pad_id`."""
    if pad_id < 0:
        return jnp.arange(ids.shape[1])
    exists = ids != pad_id
    return pad_id + jnp.cumsum(exists, 1) * exists


def count_distance_buckets(length: int, buckets: int) -> np.ndarray:
    """Returns the bucket of the distance from each token to each other, int32 `(L, L)`, as in T5 (Raffel et al. 2020):
    half of the buckets are for later tokens, and half of these for single distances; the others grow with the logarithm
    up to a distance of 128."""
    half, exact = buckets // 2, buckets // 4
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    near = np.abs(distance)
    far = np.log(np.maximum(near, 1).astype(np.float32) / exact) / np.log(128 / exact) * (half - exact)
    bucket = np.where(near < exact, near, np.minimum(exact + far.astype(np.int32), half - 1))
    return (bucket + half * (distance > 0)).astype(np.int32)


def _init_sines(key, shape, dtype):
    return sines(np.arange(shape[0]), shape[1]).astype(dtype)
