"""Pixels to Features: a backbone's grid becomes regions with a 2-D position, and a pooled embedding."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mefn_jax.data.images import normalise
from mefn_jax.encoders.positions import grid_positions
from mefn_jax.matching.features import make_features


class ImageEncoder(nn.Module):
    """uint8 pixels `(B, H, W, 3)` -> Features with N = rows x columns regions in the joint space of `dim`.

    Attributes:
        backbone: a Linen module `(pixels, deterministic) -> (grid (B, h, w, C), pooled (B, C))`.
        dim: D, the width of the joint space.
        grid: the most rows and columns of regions; a larger grid is average-pooled.
        mean, std: of the pixel channels, in [0, 1].
    """

    backbone: nn.Module
    dim: int
    grid: int
    mean: tuple
    std: tuple

    @nn.compact
    def __call__(self, pixels, deterministic=True):
        grid, pooled = self.backbone(normalise(pixels, self.mean, self.std), deterministic)
        grid = pool_grid(grid, self.grid)  # (B, h, w, C)
        batch, rows, columns, _ = grid.shape
        regions = nn.Dense(self.dim, name="regions")(grid)
        regions = regions + nn.Dense(self.dim, use_bias=False, name="positions")(grid_positions(rows, columns, 64))
        regions = regions.reshape(batch, rows * columns, self.dim)
        pooled = nn.Dense(self.dim, name="pooled")(pooled)
        return make_features(regions, jnp.ones(regions.shape[:2], bool), pooled)


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
