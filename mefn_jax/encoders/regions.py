"""Encoder of precomputed regions to Features (VSE-infinity, Chen et al. 2021). B images, N regions of width C."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mefn_jax.encoders.grids import pool_grid
from mefn_jax.encoders.input_norm import InputNorm
from mefn_jax.encoders.pooling import Pool
from mefn_jax.errors import ConfigError
from mefn_jax.features import make_features, unit

PROJECTIONS = ("linear", "mlp")


def region_dropout(mask, keys, rate: float):
    """Leaves each region out with probability `rate` (VSE-infinity's size augmentation), but never all of an image.

    `mask` bool `(B, N)` marks the existing regions, `keys (B,)` are random keys of the items. Returns bool `(B, N)`.
    Without keys, as in evaluation, `mask` is returned unchanged.
    """
    if keys is None or not rate:
        return mask
    draws = jax.vmap(lambda key: jax.random.uniform(key, mask.shape[1:]))(keys)
    draws = jnp.where(mask, draws, -1.0)
    return mask & ((draws >= rate) | (draws == jnp.max(draws, 1, keepdims=True)))


class RegionEncoder(nn.Module):
    """Encoder of precomputed regions: float `(B, N, C)` -> Features in the joint space of width `dim`.

    Attributes:
        dim: D, the width of the joint space.
        projection: "linear", or "mlp" to add a two-layer MLP to it (docs/method.md, Eq. 6). The original has BatchNorm
            in the MLP. Here LayerNorm takes its place, because no statistic crosses the batch.
        pooling: a name of `pooling.POOLINGS`, applied to the projected regions before they get unit length.
        dropout: probability that a region is left out in training.
        channel_dropout: probability that a channel is dropped in training, in all regions of an image at once.
        grid: the largest number of rows and columns, to which regions that form a square grid are pooled; 0 keeps the
            regions as they are.
        power_norm: scales each region to unit length and takes the signed square root of each channel (docs/method.md,
            Eq. 4), as is usual for histograms of activations (RootSIFT, Arandjelovic & Zisserman 2012), so that a few
            strong channels do not outweigh all others.
    """

    dim: int
    projection: str = "linear"
    pooling: str = "mean"
    dropout: float = 0.0
    channel_dropout: float = 0.0
    grid: int = 0
    power_norm: bool = False

    @nn.compact
    def __call__(self, regions, deterministic=True, keys=None, mask=None):
        """Encodes a batch; `keys (B,)` are random keys of the items, given in training only; `mask` bool `(B, N)` marks
        the regions that exist, all of them by default."""
        x, mask = self.backbone_features(regions, mask)
        mask = region_dropout(mask, keys, self.dropout)
        x = InputNorm(self.channel_dropout, name="input_norm")(x, deterministic)
        projected = nn.Dense(self.dim, name="regions")(x)
        if self.projection == "mlp":
            hidden = nn.relu(nn.LayerNorm(name="mlp_norm")(nn.Dense(self.dim // 2, name="mlp_in")(x)))
            projected = projected + nn.Dense(self.dim, name="mlp_out")(hidden)
        return make_features(projected, mask, Pool(self.pooling, name="pooling")(projected, mask))

    def backbone_features(self, regions, mask=None):
        """Returns the inputs of the projection: pooled and power-normed regions float32 `(B, N, C)`, and their mask
        bool `(B, N)`. Raises ConfigError if they are to be pooled but form no square grid."""
        mask = jnp.ones(regions.shape[:2], bool) if mask is None else mask
        x = jnp.where(mask[..., None], regions, 0).astype(jnp.float32)  # padding may hold any value, even NaN
        if self.grid and self.grid**2 < x.shape[1]:
            side = round(x.shape[1] ** 0.5)
            if side**2 != x.shape[1]:
                raise ConfigError(
                    f"image.regions.grid={self.grid}: {x.shape[1]} regions an image form no square grid; set it to 0"
                )
            x = pool_grid(x.reshape(-1, side, side, x.shape[-1]), self.grid).reshape(len(x), -1, x.shape[-1])
            mask = jnp.ones(x.shape[:2], bool)
        if self.power_norm:
            x = unit(x)
            x = jnp.sign(x) * jnp.sqrt(jnp.abs(x))
        return x, mask
