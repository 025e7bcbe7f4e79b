"""Grids of regions: pooled to fewer cells, and where their cells lie."""

import jax.numpy as jnp
import numpy as np


def pool_grid(grid, most: int):
    """Average-pools `(B, h, w, C)` to at most `most` rows and columns. Cells that do not divide evenly share their
    borders by area, so no pixel is lost."""
    pooled = jnp.einsum("rh,bhwc->brwc", _area_weights(grid.shape[1], most), grid)
    return jnp.einsum("sw,brwc->brsc", _area_weights(grid.shape[2], most), pooled)


def _area_weights(size: int, most: int):
    """How much of each of `size` cells goes into each of `min(size, most)` larger ones: float32, rows sum to 1."""
    number = min(size, most)
    edges = np.arange(number + 1) * size / number
    cells = np.arange(size)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return jnp.asarray(np.clip(overlap, 0, None) * number / size, jnp.float32)


def grid_boxes(rows: int, columns: int) -> np.ndarray:
    """The boxes of the regions, x0, y0, x1, y1 in image widths and heights, float64 `(rows * columns, 4)`."""
    y, x = np.divmod(np.arange(rows * columns), columns)
    return np.stack([x / columns, y / rows, (x + 1) / columns, (y + 1) / rows], -1)
