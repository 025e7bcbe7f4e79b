"""The GRU over words of VSE++ (Faghri et al. 2018) and SCAN (Lee et al. 2018). B texts, L positions, C width."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class GRU(nn.Module):
    """GRU text tower: token ids int32 and mask bool `(B, L)` -> `(hidden states float32 (B, L, C), pooled (B, C))`.

    Hidden states are zero where masked. The states of the two directions are averaged, as in SCAN. `pooled` is the
    average of each direction's last state (VSE++ has one direction).

    Attributes:
        vocab_size: rows of the word embedding.
        width: C, the width of the hidden states.
        word_width: columns of the word embedding.
        layers: the number of stacked layers.
        bidirectional: True as in SCAN, False as in VSE++.
        dropout: rate on the inputs of each layer.
    """

    vocab_size: int
    width: int
    word_width: int = 300
    layers: int = 1
    bidirectional: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        x = nn.Embed(self.vocab_size, self.word_width, embedding_init=_init_uniform, name="words")(ids)
        for k in range(self.layers):
            x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
            last_states, states = run_gru(x, mask, self.width, self.bidirectional, f"layer_{k}")
            x = jnp.concatenate(states, -1)
        exists = mask[..., None]
        return jnp.where(exists, sum(states) / len(states), 0.0), sum(last_states) / len(last_states)


def run_gru(x, mask, width: int, bidirectional: bool, name: str) -> tuple[list, list]:
    """Runs a GRU over `x` `(B, L, E)` forwards and, if `bidirectional`, also backwards.

    Returns two lists with an entry for each direction: the last state `(B, width)`, and all states `(B, L, width)` in
    the order of `x`. Each row of `mask` `(B, L)` is a run of True followed by False. To be called within a compact
    method.
    """
    directions = ("forward", "backward") if bidirectional else ("forward",)
    lengths = jnp.sum(mask, 1)
    outputs = []
    for direction in directions:
        cell = nn.GRUCell(width, name=f"{name}_{direction}")
        rnn = nn.RNN(cell, return_carry=True, reverse=direction == "backward", keep_order=True)
        last_state, states = rnn(x, seq_lengths=lengths)
        # For a sequence of length 0, nn.RNN returns the state after the padding.
        outputs.append((jnp.where(lengths[:, None] > 0, last_state, 0.0), states))
    last_state, states = zip(*outputs, strict=True)
    return list(last_state), list(states)


def _init_uniform(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -0.1, 0.1)
