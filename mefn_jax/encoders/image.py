"""Pixels to Features: a backbone's grids become regions of several scales, and a pooled embedding."""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.data.images import normalize_pixels
from mefn_jax.encoders.grids import pool_grid
from mefn_jax.encoders.pooling import Pool
from mefn_jax.encoders.positions import grid_positions
from mefn_jax.encoders.regions import region_dropout
from mefn_jax.features import make_features


class ImageEncoder(nn.Module):
    """uint8 pixels `(B, H, W, 3)` -> Features in the joint space of `dim`, its regions scale after scale.

    Attributes:
        backbone: a Linen module `(pixels, deterministic) -> (grids [(B, h, w, C)], pooled (B, C))`.
        dim: D, the width of the joint space.
        region_grids: for each scale the most rows and columns of regions. They are average-pooled from the backbone's last
            grids (a ResNet's stages, finest first), or from its one grid (a ViT).
        mean, std: of the pixel channels, in [0, 1].
        pooling: what becomes `pooled`: "tower" for the backbone's own, else a name of `pooling.POOLINGS`, of regions.
        dropout: the chance that a region is left out in training.
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
        """`keys (B,)` are the items' random keys in training."""
        grids, pooled = self.backbone_features(pixels, deterministic)
        positions = nn.Dense(self.dim, use_bias=False, name="positions")
        regions = []
        for k, grid in enumerate(grids):
            # A scale's own bias says which scale it is; where a region is, is said in the same terms at every scale.
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
        """The backbone's states before any projection: `(grids [(B, n, m, C)] by scale, pooled (B, C))`."""
        grids, pooled = self.backbone(normalize_pixels(pixels, self.mean, self.std), deterministic)
        grids = grids * len(self.region_grids) if len(grids) == 1 else grids[-len(self.region_grids) :]
        return [pool_grid(grid, most) for grid, most in zip(grids, self.region_grids, strict=True)], pooled
