"""Vision Transformer (Dosovitskiy et al. 2021), pre-norm, and CLIP's (Radford et al. 2021). B images, H x W pixels,
C width."""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.encoders.positions import grid_positions, resize_positions
from mefn_jax.encoders.transformer import Block


class ViT(nn.Module):
    """Normalised pixels `(B, H, W, 3)` -> `(grid (B, H/p, W/p, C), pooled (B, C))`.

    Attributes, beyond the usual:
        patch: the patch size p; H and W must be multiples of it.
        stem: widths of 3 x 3 convolutions of stride 2 before the patches are cut (Xiao et al. 2021); empty for the
            original.
        pool: what `pooled` is: "mean" of the grid, without a class token; the "class" token; "tanh" of a layer on it,
            as in Hugging Face's ViT.
        table: rows and columns of the position table, which is interpolated to the input's grid; () for the input's.
        embed_norm: CLIP's norm before the first block, whose patches have no bias.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch: int
    stem: tuple = ()
    dropout: float = 0.0
    pool: str = "mean"
    table: tuple = ()
    embed_norm: bool = False
    bias: bool = True  # of query, key and value
    activation: str = "gelu"
    eps: float = 1e-6

    @nn.compact
    def __call__(self, pixels, deterministic=True):
        height, width = pixels.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ValueError(f"image size {height} x {width} is not a multiple of the patch size {self.patch}")
        x, patch = pixels, self.patch
        for k, channels in enumerate(self.stem):
            x = nn.relu(nn.Conv(channels, (3, 3), (2, 2), name=f"stem_{k}")(x))
            patch //= 2
        bias = not self.embed_norm
        x = nn.Conv(self.width, (patch, patch), (patch, patch), "VALID", use_bias=bias, name="patches")(x)
        batch, rows, columns, _ = x.shape
        x = x.reshape(batch, rows * columns, self.width) + self._positions(rows, columns)
        if self.pool != "mean":
            first = self.param("class", nn.initializers.normal(0.02), (1, 1, self.width))
            first = first + self.param("class_position", nn.initializers.normal(0.02), (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(first, (batch, 1, self.width)), x], 1)
        if self.embed_norm:
            x = nn.LayerNorm(self.eps, name="embed_norm")(x)
        for k in range(self.layers):
            block = Block(
                self.heads,
                self.mlp_width,
                True,
                self.dropout,
                self.eps,
                self.activation,
                False,
                self.bias,
                name=f"layer_{k}",
            )
            x = block(x, None, deterministic)
        x = nn.LayerNorm(self.eps, name="norm")(x)
        grid = x[:, -rows * columns :].reshape(batch, rows, columns, self.width)
        if self.pool == "mean":
            return grid, x.mean(1)
        if self.pool == "class":
            return grid, x[:, 0]
        return grid, nn.tanh(nn.Dense(self.width, name="pooler")(x[:, 0]))

    def _positions(self, rows: int, columns: int):
        """Learned, but begun as sines as large as the patches' content (Beyer et al. 2022): from nearly nothing, the
        first norm would blow the noise of an empty patch up to the size of an object."""
        old = self.table or (rows, columns)
        table = self.param("positions", lambda _: grid_positions(*old, self.width).reshape(1, -1, self.width))
        return resize_positions(table[0], old, (rows, columns))[None]
