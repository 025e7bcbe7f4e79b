"""Image encoder: pixels to Features. The backbone's grids become regions of several scales, and a pooled embedding."""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.data.images import normalize_pixels
from mefn_jax.encoders.grids import pool_grid
from mefn_jax.encoders.pooling import Pool
from mefn_jax.encoders.positions import grid_positions
from mefn_jax.encoders.regions import region_dropout
from mefn_jax.features import make_features


class ImageEncoder(nn.Module):
    """Image encoder: uint8 pixels `(B, H, W, 3)` -> Features in the joint space of width `dim`.

    Regions are projected by docs/method.md, Eq. 3, and stand scale after scale.

    Attributes:
        backbone: a Linen module `(pixels, deterministic) -> (grids [(B, h, w, C)], pooled (B, C))`.
        dim: D, the width of the joint space.
        region_grids: for each scale, the largest number of rows and columns of regions. They are average-pooled from
            the backbone's last grids (a ResNet's stages, finest first), or from its single grid (a ViT).
        mean: mean of the pixel channels, in [0, 1].
        std: standard deviation of the pixel channels, in the same units.
        pooling: source of `pooled`: "tower" for the backbone's own pooled state, or a name of `pooling.POOLINGS` for a
            pooling of the regions.
        dropout: probability that a region is left out in training.
    """

    backbone: nn.Module
    dim: int
    region_grids: tuple
    mean: tuple
    std: tuple
    pooling: str = "tower"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, pixels, deterministic=True, keys=None):
        """Encodes a batch; `keys (B,)` are random keys of the items, given in training only."""
        grids, pooled = self.backbone_features(pixels, deterministic)
        positions = nn.Dense(self.dim, use_bias=False, name="positions")
        regions = []
        for k, grid in enumerate(grids):
            # The bias of each scale tells the scales apart. Positions are shared by all scales.
            region = nn.Dense(self.dim, name=f"regions_{k}")(grid) + positions(grid_positions(*grid.shape[1:3], 64))
            regions.append(region.reshape(len(pixels), -1, self.dim))
        regions = jnp.concatenate(regions, 1)  # (B, N, D)
        mask = region_dropout(jnp.ones(regions.shape[:2], bool), keys, self.dropout)
        if self.pooling == "tower":
            pooled = nn.Dense(self.dim, name="pooled")(pooled)
        else:
            pooled = Pool(self.pooling, name="pooling")(regions, mask)
        return make_features(regions, mask, pooled)

    def backbone_features(self, pixels, deterministic=True):
        """Returns the backbone's states before any projection: `(grids [(B, n, m, C)] by scale, pooled (B, C))`."""
        grids, pooled = self.backbone(normalize_pixels(pixels, self.mean, self.std), deterministic)
        grids = grids * len(self.region_grids) if len(grids) == 1 else grids[-len(self.region_grids) :]
        return [pool_grid(grid, max_side) for grid, max_side in zip(grids, self.region_grids, strict=True)], pooled
