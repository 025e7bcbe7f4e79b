"""Where a cell of a grid or a word of a text is, as sines (Vaswani et al. 2017)."""

import jax.numpy as jnp
import numpy as np


def grid_positions(rows: int, columns: int, width: int):
    """2-D sine positions of a grid, float32 `(rows, columns, width)`: half for the row, half for the column. Cell
    centres are taken on a fixed scale of 0 to 32, so that grids of different size agree on where things are."""
    down, across = ((np.arange(n) + 0.5) / n * 32 for n in (rows, columns))
    table = [sines(at, width // 2) for at in (down, across)]
    shape = (rows, columns, width // 2)
    parts = (jnp.broadcast_to(table[0][:, None], shape), jnp.broadcast_to(table[1][None], shape))
    return jnp.concatenate(parts, -1)


def sines(at, width: int):
    """Sine and cosine of each position in `at` `(L,)` at width / 2 wave lengths, 6 to 600: float32 `(L, width)`."""
    angles = at[:, None] / 100 ** (np.arange(0, width, 2) / width)
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], -1), jnp.float32)
