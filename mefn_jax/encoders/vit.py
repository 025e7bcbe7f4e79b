"""Vision Transformer (Dosovitskiy et al. 2021), pre-norm. B images, H x W pixels, C width."""

import flax.linen as nn

from mefn_jax.encoders.positions import grid_positions
from mefn_jax.encoders.transformer import Block


class ViT(nn.Module):
    """Normalised pixels `(B, H, W, 3)` -> `(grid (B, H/p, W/p, C), pooled (B, C))`; pooled is the mean of the grid.

    `patch` is the patch size p; H and W must be multiples of it. `stem` is a tuple of widths of 3 x 3 convolutions of
    stride 2 before the patches are cut (Xiao et al. 2021); empty for the original.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch: int
    stem: tuple = ()
    dropout: float = 0.0

    @nn.compact
    def __call__(self, pixels, deterministic=True):
        height, width = pixels.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ValueError(f"image size {height} x {width} is not a multiple of the patch size {self.patch}")
        x, patch = pixels, self.patch
        for k, channels in enumerate(self.stem):
            x = nn.relu(nn.Conv(channels, (3, 3), (2, 2), name=f"stem_{k}")(x))
            patch //= 2
        x = nn.Conv(self.width, (patch, patch), (patch, patch), padding="VALID", name="patches")(x)
        batch, rows, columns, _ = x.shape
        x = x.reshape(batch, rows * columns, self.width)
        # Learned, but begun as sines as large as the patches' content (Beyer et al. 2022): from nearly nothing, the
        # first norm would blow the noise of an empty patch up to the size of an object.
        x = x + self.param("positions", lambda _: grid_positions(rows, columns, self.width).reshape(1, -1, self.width))
        for k in range(self.layers):
            x = Block(self.heads, self.mlp_width, True, self.dropout, name=f"layer_{k}")(x, None, deterministic)
        x = nn.LayerNorm(1e-6, name="norm")(x)
        return x.reshape(batch, rows, columns, self.width), x.mean(1)
