"""Vision Transformer (Dosovitskiy et al. 2021), pre-norm, and CLIP's (Radford et al. 2021). B images, H x W pixels,
C width."""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.encoders.positions import grid_positions, resize_positions
from mefn_jax.encoders.transformer import Transformer


class ViT(Transformer, kw_only=True):
    """Normalised pixels `(B, H, W, 3)` -> `([grid (B, H/p, W/p, C)], pooled (B, C))`.

    Attributes, beyond a Transformer's:
        patch: the patch size p; H and W must be multiples of it.
        stem: widths of 3 x 3 convolutions of stride 2 before the patches are cut (Xiao et al. 2021); empty for the
            original.
        pool: what `pooled` is: "mean" of the grid, without a class token; the "class" token; "pooler", a
            tanh layer on it, as in Hugging Face's ViT.
        position_grid: rows and columns of the position table, which is interpolated to the input's grid; () for the input's.
        embed_norm: CLIP's norm before the first block, whose patches have no bias.
        qkv_bias: of query, key and value.
    """

    patch: int
    stem: tuple = ()
    pool: str = "mean"
    position_grid: tuple = ()
    embed_norm: bool = False
    qkv_bias: bool = True

    @nn.compact
    def __call__(self, pixels, deterministic=True):
        height, width = pixels.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ValueError(f"image size {height} x {width} is not a multiple of the patch size {self.patch}")
        x = self._patches(pixels)
        batch, rows, columns, _ = x.shape
        x = x.reshape(batch, rows * columns, self.width) + self._positions(rows, columns).astype(x.dtype)
        if self.pool != "mean":
            first = self.param("class", nn.initializers.normal(0.02), (1, 1, self.width))
            first = first + self.param("class_position", nn.initializers.normal(0.02), (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(first, (batch, 1, self.width)).astype(x.dtype), x], 1)
        if self.embed_norm:
            x = nn.LayerNorm(self.eps, dtype=self.dtype, name="embed_norm")(x)
        x = self.blocks(x, None, deterministic, pre_norm=True, qkv_bias=self.qkv_bias)
        x = nn.LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        grids = [x[:, -rows * columns :].reshape(batch, rows, columns, self.width)]
        if self.pool == "mean":
            return grids, x.mean(1)
        if self.pool == "class":
            return grids, x[:, 0]
        return grids, nn.tanh(nn.Dense(self.width, dtype=self.dtype, name="pooler")(x[:, 0]))

    def _patches(self, x):
        patch = self.patch
        for k, channels in enumerate(self.stem):
            x = nn.relu(nn.Conv(channels, (3, 3), (2, 2), dtype=self.dtype, name=f"stem_{k}")(x))
            patch //= 2
        size, bias = (patch, patch), not self.embed_norm
        return nn.Conv(self.width, size, size, "VALID", use_bias=bias, dtype=self.dtype, name="patches")(x)

    def _positions(self, rows: int, columns: int):
        """Learned, but begun as sines as large as the patches' content (Beyer et al. 2022): from nearly nothing, the
        first norm would blow the noise of an empty patch up to the size of an object."""
        old = self.position_grid or (rows, columns)
        table = self.param("positions", lambda _: grid_positions(*old, self.width).reshape(1, -1, self.width))
        return resize_positions(table[0], old, (rows, columns))[None]
