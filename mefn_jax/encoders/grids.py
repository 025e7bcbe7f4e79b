"""Region grids: pooling to fewer cells (docs/method.md, Eq. 2), and the boxes of the cells."""

import jax
import jax.numpy as jnp
import numpy as np


def pool_grid(grid, max_side: int):
    """Average-pools `(B, h, w, C)` to at most `max_side` rows and columns (docs/method.md, Eq. 2).

    Where sizes do not divide evenly, a cell on a border is shared by area, so that no pixel is lost.
    """
    row_weights, column_weights = (_compute_area_weights(size, max_side) for size in grid.shape[1:3])
    # Sums of whole rows, which XLA computes in one pass; a matrix product would need a transposed copy of the grid.
    rows = (_sum_weighted(grid, w) for w in row_weights)  # (B, w, C) each
    cells = [_sum_weighted(row, w) for row in rows for w in column_weights]  # (B, C) each
    return jnp.stack(cells, 1).reshape(len(grid), len(row_weights), len(column_weights), grid.shape[-1])


def _sum_weighted(x, weights: np.ndarray):
    """Returns the weighted sum `(B, ...)` of the slices `x[:, k]` whose weight is not 0."""
    return sum(weights[k] * jax.lax.index_in_dim(x, k, 1, keepdims=False) for k in np.flatnonzero(weights))


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
