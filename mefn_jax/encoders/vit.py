"""Vision Transformer (Dosovitskiy et al. 2021), pre-norm, in the variants of CLIP (Radford et al. 2021), SigLIP
(Zhai et al. 2023), DINOv2 (Oquab et al. 2023; with registers: Darcet et al. 2024) and DINOv3 (Simeoni et al. 2025).

B images, H x W pixels, C width.
"""

import flax.linen as nn
import jax.numpy as jnp

from mefn_jax.encoders.attention_pool import AttentionPool
from mefn_jax.encoders.positions import grid_positions, grid_rotation, resize_positions
from mefn_jax.encoders.transformer import Transformer

CLASS_POOLS = ("class", "pooler")  # these pool a class token


class ViT(Transformer, kw_only=True):
    """Vision Transformer: normalized pixels `(B, H, W, 3)` -> `([grid (B, H/p, W/p, C)], pooled (B, C))`.

    The grid is that of the patches alone: a class token and registers are left out.

    Attributes, beyond a Transformer's:
        patch: p, the side of a patch in pixels; H and W must be multiples of it.
        stem: widths of 3 x 3 convolutions of stride 2 before the patches are cut (Xiao et al. 2021); empty as in the
            original.
        pool: source of `pooled`: "mean" of the grid, without a class token; "class", the class token; "pooler", a tanh
            layer on the class token, as in Hugging Face's ViT; or "attention", SigLIP's head, without a class token.
        registers: number of learned tokens without a position, between class token and patches.
        position_grid: rows and columns of the position table, which is interpolated to the grid of the input; () takes
            the grid of the input.
        antialias: smooths where the position table is made smaller.
        rotation_base: base of the frequencies by which attention is rotated (RoPE) in place of a position table, as in
            DINOv3; 0 has a table.
        embed_norm: CLIP's norm before the first block; the patch embedding then has no bias.
        qkv_bias: as in `Block`, and so are key_bias, gated and layer_scale.
    """

    patch: int
    stem: tuple = ()
    pool: str = "mean"
    registers: int = 0
    position_grid: tuple = ()
    antialias: bool = False
    rotation_base: float = 0.0
    embed_norm: bool = False
    qkv_bias: bool = True
    key_bias: bool = True
    gated: bool = False
    layer_scale: bool = False

    @nn.compact
    def __call__(self, pixels, deterministic=True):
        height, width = pixels.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ValueError(f"image size {height} x {width} is not a multiple of the patch size {self.patch}")
        x = self._embed_patches(pixels)
        batch, rows, columns, _ = x.shape
        x = x.reshape(batch, rows * columns, self.width)
        if not self.rotation_base:
            x = x + self._resize_positions(rows, columns).astype(x.dtype)
        first = [jnp.broadcast_to(token, (batch, *token.shape[1:])).astype(x.dtype) for token in self._make_tokens()]
        x = jnp.concatenate([*first, x], 1)  # (B, L, C)
        if self.embed_norm:
            x = nn.LayerNorm(self.eps, dtype=self.dtype, name="embed_norm")(x)
        x = self.blocks(
            x,
            None,
            deterministic,
            self._make_rotation(rows, columns, before=x.shape[1] - rows * columns),
            pre_norm=True,
            qkv_bias=self.qkv_bias,
            key_bias=self.key_bias,
            gated=self.gated,
            layer_scale=self.layer_scale,
        )
        x = nn.LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        patches = x[:, -rows * columns :]
        return [patches.reshape(batch, rows, columns, self.width)], self._pool(x, patches)

    def _make_tokens(self) -> list:
        """Returns the class token and the registers, those that there are, `(1, n, C)` each."""
        init = nn.initializers.normal(0.02)
        tokens = []
        if self.pool in CLASS_POOLS:
            token = self.param("class", init, (1, 1, self.width))
            if not self.rotation_base:
                token = token + self.param("class_position", init, (1, 1, self.width))
            tokens.append(token)
        if self.registers:
            tokens.append(self.param("registers", init, (1, self.registers, self.width)))
        return tokens

    def _pool(self, x, patches):
        """Returns `pooled` `(B, C)` from the states of all tokens `x` and those of the patches alone."""
        if self.pool == "mean":
            return patches.mean(1)
        if self.pool == "attention":
            return AttentionPool(self.heads, self.mlp_width, self.eps, self.activation, self.dtype, name="head")(
                patches
            )
        if self.pool == "class":
            return x[:, 0]
        return nn.tanh(nn.Dense(self.width, dtype=self.dtype, name="pooler")(x[:, 0]))

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
        return resize_positions(table[0], grid, (rows, columns), self.antialias)[None]

    def _make_rotation(self, rows: int, columns: int, before: int):
        """Returns the `rotation` of `SelfAttention` for a grid of patches after `before` other tokens, None without."""
        if not self.rotation_base:
            return None
        return grid_rotation(rows, columns, self.width // self.heads, self.rotation_base, before)
