"""Precomputed region features to Features (VSE-infinity, Chen et al. 2021). B images, N regions, C their width."""

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
    """Region dropout (VSE-infinity's size augmentation): each region of `mask` bool `(B, N)` is left out with chance
    `rate`, by an item's own random key `keys (B,)`; one always stays. Returns bool `(B, N)`; without keys, as in
    evaluation, `mask` as it is."""
    if keys is None or not rate:
        return mask
    draws = jax.vmap(lambda key: jax.random.uniform(key, mask.shape[1:]))(keys)
    draws = jnp.where(mask, draws, -1.0)
    return mask & ((draws >= rate) | (draws == jnp.max(draws, 1, keepdims=True)))


class RegionEncoder(nn.Module):
    """Regions float `(B, N, C)` -> Features in the joint space of `dim`.

    Attributes:
        dim: D, the width of the joint space.
        projection: "linear", or "mlp": a two-layer MLP is added to it. The original has BatchNorm in the MLP; with no
            statistic crossing the batch (DESIGN.md 6), LayerNorm stands there.
        pooling: a name of `pooling.POOLINGS`, of the projected regions before they get unit length.
        dropout: the chance that a region is left out in training; channel_dropout: that a channel is, of all regions.
        grid: regions are a square grid, pooled to at most so many rows and columns; 0: as they are.
        transform: "root" takes each region's square root of unit length, as for other histograms of activations
            (RootSIFT, Arandjelovic & Zisserman 2012), so that few strong channels do not outweigh all others.
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
        """`keys (B,)` are the items' random keys in training; `mask` bool `(B, N)` says which regions exist, by default
        all."""
        x, mask = self.backbone_features(regions, mask)
        mask = region_dropout(mask, keys, self.dropout)
        x = InputNorm(self.channel_dropout, name="input_norm")(x, deterministic)
        projected = nn.Dense(self.dim, name="regions")(x)
        if self.projection == "mlp":
            hidden = nn.relu(nn.LayerNorm(name="mlp_norm")(nn.Dense(self.dim // 2, name="mlp_in")(x)))
            projected = projected + nn.Dense(self.dim, name="mlp_out")(hidden)
        return make_features(projected, mask, Pool(self.pooling, name="pooling")(projected, mask))

    def backbone_features(self, regions, mask=None):
        """What is projected: regions float32 `(B, N, C)`, pooled and transformed, and their mask bool `(B, N)`."""
        mask = jnp.ones(regions.shape[:2], bool) if mask is None else mask
        x = jnp.where(mask[..., None], regions, 0).astype(jnp.float32)  # a padded place may hold anything, NaN too
        if self.grid and self.grid**2 < x.shape[1]:
            side = round(x.shape[1] ** 0.5)
            if side**2 != x.shape[1]:
                raise ConfigError(f"image.regions.grid={self.grid}: {x.shape[1]} regions an image are no square grid")
            x = pool_grid(x.reshape(-1, side, side, x.shape[-1]), self.grid).reshape(len(x), -1, x.shape[-1])
            mask = jnp.ones(x.shape[:2], bool)
        if self.power_norm:
            x = unit(x)
            x = jnp.sign(x) * jnp.sqrt(jnp.abs(x))
        return x, mask
