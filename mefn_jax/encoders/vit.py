"""Vision Transformer (Dosovitskiy et al. 2021), pre-norm, also in CLIP's variant (Radford et al. 2021).

B images, H x W pixels, C width.
"""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.encoders.positions import grid_positions, resize_positions
from mefn_jax.encoders.transformer import Transformer


class ViT(Transformer, kw_only=True):
    """Vision Transformer: normalized pixels `(B, H, W, 3)` -> `([grid (B, H/p, W/p, C)], pooled (B, C))`.

    Attributes, beyond a Transformer's:
        patch: p, the side of a patch in pixels; H and W must be multiples of it.
        stem: widths of 3 x 3 convolutions of stride 2 before the patches are cut (Xiao et al. 2021); empty as in the
            original.
        pool: source of `pooled`: "mean" of the grid, without a class token; "class", the class token; or "pooler", a
            tanh layer on the class token, as in Hugging Face's ViT.
        position_grid: rows and columns of the position table, which is interpolated to the grid of the input; () takes
            the grid of the input.
        embed_norm: CLIP's norm before the first block; the patch embedding then has no bias.
        qkv_bias: query, key and value have a bias.
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
        x = self._embed_patches(pixels)
        batch, rows, columns, _ = x.shape
        x = x.reshape(batch, rows * columns, self.width) + self._resize_positions(rows, columns).astype(x.dtype)
        if self.pool != "mean":
            class_token = self.param("class", nn.initializers.normal(0.02), (1, 1, self.width))
            class_token = class_token + self.param("class_position", nn.initializers.normal(0.02), (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(class_token, (batch, 1, self.width)).astype(x.dtype), x], 1)
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

    def _embed_patches(self, x):
        """Runs the stem and projects the patches: `(B, H, W, 3) -> (B, H/p, W/p, C)`."""
        patch = self.patch
        for k, channels in enumerate(self.stem):
            x = nn.relu(nn.Conv(channels, (3, 3), (2, 2), dtype=self.dtype, name=f"stem_{k}")(x))
            patch //= 2
        size, bias = (patch, patch), not self.embed_norm
        return nn.Conv(self.width, size, size, "VALID", use_bias=bias, dtype=self.dtype, name="patches")(x)

    def _resize_positions(self, rows: int, columns: int):
        """Returns the position embedding of a grid of patches, `(1, rows * columns, C)`.

        The table is learned but starts as sine codes, which are as large as the embedded patches (Beyer et al. 2022).
        If it started close to zero, the first norm would scale the noise of an empty patch up to the size of an object.
        """
        grid = self.position_grid or (rows, columns)
        table = self.param("positions", lambda _: grid_positions(*grid, self.width).reshape(1, -1, self.width))
        return resize_positions(table[0], grid, (rows, columns))[None]
