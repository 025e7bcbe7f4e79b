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


def grid_rotation(rows: int, columns: int, width: int, base: float, before: int):
    """Returns the rotation of DINOv3's attention (Simeoni et al. 2025): cosines and sines float32
    `(before + rows * columns, width)` for `before` tokens without a place, which are not rotated, and a grid.

    A quarter of the `width` channels of a head has the frequencies of the row, the next one those of the column, and
    the second half repeats them. Cell centers lie in -1 to 1, so that grids of all sizes span the same angles.
    """
    frequencies = 2 * np.pi / base ** np.arange(0, 1, 4 / width)  # (width / 4,)
    y, x = (2 * (np.arange(n) + 0.5) / n - 1 for n in (rows, columns))
    centers = np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)
    angles = np.tile((centers[:, :, None] * frequencies).reshape(len(centers), -1), 2)
    angles = np.concatenate([np.zeros((before, width)), angles])
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def resize_positions(table, old: tuple[int, int], new: tuple[int, int], antialias: bool = False):
    """Resizes a table of learned positions `(rows * columns, C)` from an `old` grid (rows, columns) to a `new` one.

    Interpolates bicubically as PyTorch does (`align_corners=False`), so that pretrained ViTs give the same results as
    there at any input size. With `antialias`, a smaller grid averages over more of the old one (DINOv2 with registers,
    open_clip).
    """
    if old == new:
        return table
    compute_weights = _compute_smooth_cubic_weights if antialias else _compute_cubic_weights
    grid = table.reshape(*old, -1)
    grid = jnp.einsum("rh,hwc->rwc", compute_weights(old[0], new[0]), grid)
    return jnp.einsum("sw,rwc->rsc", compute_weights(old[1], new[1]), grid).reshape(new[0] * new[1], -1)


def _compute_cubic_weights(old: int, new: int):
    """Returns the weight of each of `old` samples in each of `new` samples, float32 `(new, old)`; rows sum to 1."""
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(centers).astype(int)
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        d = np.abs(centers - left - offset)
        np.add.at(weights, (np.arange(new), np.clip(left + offset, 0, old - 1)), _cubic(d, -0.75))
    return jnp.asarray(weights, jnp.float32)


def _compute_smooth_cubic_weights(old: int, new: int):
    """Returns weights as `_compute_cubic_weights` does, but with the kernel as wide as a new sample, and cut off at the
    border instead of repeating the outermost sample."""
    stretch = max(old / new, 1.0)
    centers = (np.arange(new) + 0.5) * old / new
    weights = _cubic(np.abs(np.arange(old) + 0.5 - centers[:, None]) / stretch, -0.5)
    return jnp.asarray(weights / weights.sum(1, keepdims=True), jnp.float32)


def _cubic(distance, a: float):
    """Computes the cubic convolution kernel with parameter `a` (Keys 1981)."""
    d = distance
    near, far = ((a + 2) * d - (a + 3)) * d * d + 1, a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
