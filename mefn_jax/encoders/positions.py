"""Sine codes of positions in a grid or in a text (Vaswani et al. 2017), and resizing of learned position tables."""

import jax.numpy as jnp
import numpy as np


def grid_positions(rows: int, columns: int, width: int):
    """Returns the 2-D sine codes of a grid, float32 `(rows, columns, width)` (`pos` in docs/method.md, Eq. 3).

    One half of the width encodes the row, the other half the column. Cell centers lie on a fixed scale of 0 to 32, so
    that the same place has the same code in grids of different sizes.
    """
    y, x = ((np.arange(n) + 0.5) / n * 32 for n in (rows, columns))
    table = [sines(centers, width // 2) for centers in (y, x)]
    shape = (rows, columns, width // 2)
    halves = (jnp.broadcast_to(table[0][:, None], shape), jnp.broadcast_to(table[1][None], shape))
    return jnp.concatenate(halves, -1)


def sines(positions, width: int):
    """Returns sine and cosine of `positions` `(L,)` at width / 2 wavelengths from 6 to 600, float32 `(L, width)`."""
    angles = positions[:, None] / 100 ** (np.arange(0, width, 2) / width)
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], -1), jnp.float32)


def resize_positions(table, old: tuple[int, int], new: tuple[int, int]):
    """Resizes a table of learned positions `(rows * columns, C)` from an `old` grid (rows, columns) to a `new` one.

    Interpolates bicubically as PyTorch does (`align_corners=False`, a = -0.75), so that pretrained ViTs give the same
    results as there at any input size.
    """
    if old == new:
        return table
    grid = table.reshape(*old, -1)
    grid = jnp.einsum("rh,hwc->rwc", _compute_cubic_weights(old[0], new[0]), grid)
    return jnp.einsum("sw,rwc->rsc", _compute_cubic_weights(old[1], new[1]), grid).reshape(new[0] * new[1], -1)


def _compute_cubic_weights(old: int, new: int):
    """Returns the weight of each of `old` samples in each of `new` samples, float32 `(new, old)`; rows sum to 1."""
    a = -0.75
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(centers).astype(int)
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        d = np.abs(centers - left - offset)
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, a * (((d - 5) * d + 8) * d - 4)
        np.add.at(weights, (np.arange(new), np.clip(left + offset, 0, old - 1)), np.where(d <= 1, near, far))
    return jnp.asarray(weights, jnp.float32)
