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


def resize_positions(table, old: tuple[int, int], new: tuple[int, int]):
    """A table of learned positions `(rows * columns, C)` of an `old` grid for a `new` one, by bicubic interpolation as
    PyTorch does it (`align_corners=False`, a = -0.75), so that pretrained ViTs agree at any input size."""
    if old == new:
        return table
    grid = table.reshape(*old, -1)
    grid = jnp.einsum("rh,hwc->rwc", _cubic_weights(old[0], new[0]), grid)
    return jnp.einsum("sw,rwc->rsc", _cubic_weights(old[1], new[1]), grid).reshape(new[0] * new[1], -1)


def _cubic_weights(old: int, new: int):
    """How much of each of `old` samples goes into each of `new`: float32 `(new, old)`, rows sum to 1."""
    a = -0.75
    at = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(at).astype(int)
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        d = np.abs(at - left - offset)
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, a * (((d - 5) * d + 8) * d - 4)
        np.add.at(weights, (np.arange(new), np.clip(left + offset, 0, old - 1)), np.where(d <= 1, near, far))
    return jnp.asarray(weights, jnp.float32)
