"""Precomputed region features to Features (VSE-infinity, Chen et al. 2021). B images, N regions, C their width."""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.encoders.pooling import Pool
from mefn_jax.matching.features import make_features

PROJECTIONS = ("linear", "mlp")


class RegionEncoder(nn.Module):
    """Regions float `(B, N, C)` and mask bool `(B, N)` -> Features in the joint space of `dim`.

    Attributes:
        dim: D, the width of the joint space.
        projection: "linear", or "mlp": a two-layer MLP is added to it. The original has BatchNorm in the MLP; with no
            statistic crossing the batch (DESIGN.md 6), LayerNorm stands there.
        pooling: a name of `pooling.POOLINGS`, of the projected regions before they get unit length.
    """

    dim: int
    projection: str = "linear"
    pooling: str = "mean"

    @nn.compact
    def __call__(self, regions, mask, deterministic=True):
        x = jnp.where(mask[..., None], regions, 0).astype(jnp.float32)  # a padded place may hold anything, NaN too
        projected = nn.Dense(self.dim, name="regions")(x)
        if self.projection == "mlp":
            hidden = nn.relu(nn.LayerNorm(name="mlp_norm")(nn.Dense(self.dim // 2, name="mlp_in")(x)))
            projected = projected + nn.Dense(self.dim, name="mlp_out")(hidden)
        return make_features(projected, mask, Pool(self.pooling, name="pooling")(projected, mask))
