"""Region grids: pooling to fewer cells (docs/method.md, Eq. 2), and the boxes of the cells."""

import jax
import jax.numpy as jnp
import numpy as np


def pool_grid(grid, max_side: int):
    """Average-pools `(B, h, w, C)` to at most `max_side` rows and columns (docs/method.md, Eq. 2).

    Where sizes do not divide evenly, a cell on a border is shared by area, so that no pixel is lost.
    """
    return _pool_axis(_pool_axis(grid, 1, max_side), 2, max_side)


def _pool_axis(grid, axis: int, max_side: int):
    """Average-pools one axis by sums of whole rows; a matrix product would need a transposed copy of the grid."""
    weights = _compute_area_weights(grid.shape[axis], max_side)
    rows = [jax.lax.index_in_dim(grid, k, axis, keepdims=False) for k in range(grid.shape[axis])]
    return jnp.stack([sum(w[k] * rows[k] for k in np.flatnonzero(w)) for w in weights], axis)


def _compute_area_weights(size: int, max_side: int) -> np.ndarray:
    """Returns the share of each of `size` cells in each of `min(size, max_side)` larger cells, float32
    `(min(size, max_side), size)`; rows sum to 1."""
    num_pooled = min(size, max_side)
    edges = np.arange(num_pooled + 1) * size / num_pooled
    cells = np.arange(size)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return (np.clip(overlap, 0, None) * num_pooled / size).astype(np.float32)


def grid_boxes(rows: int, columns: int) -> np.ndarray:
    """Returns the boxes of a grid's regions, float64 `(rows * columns, 4)`: x0, y0, x1, y1 as fractions of the image's
    width and height."""
    y, x = np.divmod(np.arange(rows * columns), columns)
    return np.stack([x / columns, y / rows, (x + 1) / columns, (y + 1) / rows], -1)
