"""The GRU over words of VSE++ (Faghri et al. 2018) and SCAN (Lee et al. 2018). B texts, L positions, C width."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class GRU(nn.Module):
    """ids int32 and mask bool `(B, L)` -> `(hidden states float32 (B, L, C), pooled (B, C))`, zero where masked.

    The two directions' states are averaged, as in SCAN; `pooled` is the average of their last ones (VSE++, which has
    one direction).

    Attributes:
        vocab_size: rows of the word embedding; word_width: its columns.
        width: C, of the states.
        layers: one on top of another.
        bidirectional: SCAN; False: VSE++.
        dropout: on what each layer reads.
    """

    vocab_size: int
    width: int
    word_width: int = 300
    layers: int = 1
    bidirectional: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        x = nn.Embed(self.vocab_size, self.word_width, embedding_init=_small, name="words")(ids)
        for k in range(self.layers):
            x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
            last, states = run_gru(x, mask, self.width, self.bidirectional, f"layer_{k}")
            x = jnp.concatenate(states, -1)
        exists = mask[..., None]
        return jnp.where(exists, sum(states) / len(states), 0.0), sum(last) / len(last)


def run_gru(x, mask, width: int, bidirectional: bool, name: str) -> tuple[list, list]:
    """A GRU over `x` `(B, L, E)` forwards, and backwards if `bidirectional`: for each direction its last state
    `(B, width)` and its states `(B, L, width)` in the order of `x`. The mask `(B, L)` is True, then False. Within a
    compact method."""
    names = ("forward", "backward") if bidirectional else ("forward",)
    lengths = jnp.sum(mask, 1)
    runs = []
    for direction in names:
        cell = nn.GRUCell(width, name=f"{name}_{direction}")
        rnn = nn.RNN(cell, return_carry=True, reverse=direction == "backward", keep_order=True)
        last, states = rnn(x, seq_lengths=lengths)
        # Of a sequence of length 0, nn.RNN gives the state behind the padding.
        runs.append((jnp.where(lengths[:, None] > 0, last, 0.0), states))
    last, states = zip(*runs, strict=True)
    return list(last), list(states)


def _small(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -0.1, 0.1)
