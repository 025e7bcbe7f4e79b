"""ResNet v1.5 (He et al. 2016; the stride sits on the 3 x 3), with two kinds of normalisation.

From scratch it has GroupNorm: no statistic crosses the batch, so that 1 and 8 devices agree (DESIGN.md 6). Groups have
16 channels: with the usual 32 groups a narrow network would normalise single channels, and lose colour with them.
Pretrained, it runs BatchNorm on its stored statistics.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

GROUP_SIZE = 16


class StoredBatchNorm(nn.Module):
    """BatchNorm on stored statistics, `(x - mean) / sqrt(var + 1e-5) * scale + bias`. Scale and bias are trained; the
    statistics are constants that are kept among the parameters, and get no gradient."""

    @nn.compact
    def __call__(self, x):
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, (x.shape[-1],)
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, var = (jax.lax.stop_gradient(self.param(n, i, shape)) for n, i in (("mean", zeros), ("var", ones)))
        factor = scale / jnp.sqrt(var + 1e-5)
        return x * factor + (bias - mean * factor)


def norm_layer(kind: str, width: int, name: str) -> nn.Module:
    """The normalisation of `width` channels: "batch", or "group" with groups of `GROUP_SIZE` channels (one group where
    there are fewer)."""
    if kind == "batch":
        return StoredBatchNorm(name=name)
    return nn.GroupNorm(max(1, width // GROUP_SIZE), name=name)


def conv(width: int, kernel: int, stride: int, name: str) -> nn.Conv:
    """A convolution padded by half its kernel on both sides, as PyTorch's are (SAME pads one side less)."""
    return nn.Conv(width, (kernel, kernel), (stride, stride), kernel // 2, use_bias=False, name=name)


class Residual(nn.Module):
    """One residual block, `basic` (two 3 x 3) or `bottleneck` (1 x 1, 3 x 3, 1 x 1 at a quarter of the width), whose
    stride sits on the 3 x 3, or with `stride_first` on the first 1 x 1 (v1)."""

    width: int
    stride: int
    bottleneck: bool
    norm: str = "group"
    stride_first: bool = False

    @nn.compact
    def __call__(self, x):
        def normed(y, width, kernel, stride, name):
            return norm_layer(self.norm, width, name + "_norm")(conv(width, kernel, stride, name)(y))

        if self.bottleneck:
            first, second = (self.stride, 1) if self.stride_first else (1, self.stride)
            y = nn.relu(normed(x, self.width // 4, 1, first, "conv_1"))
            y = nn.relu(normed(y, self.width // 4, 3, second, "conv_2"))
            y = normed(y, self.width, 1, 1, "conv_3")
        else:
            y = nn.relu(normed(x, self.width, 3, self.stride, "conv_1"))
            y = normed(y, self.width, 3, 1, "conv_2")
        if x.shape[-1] != self.width or self.stride != 1:
            x = normed(x, self.width, 1, self.stride, "shortcut")
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Normalised pixels `(B, H, W, 3)` -> `(grid (B, h, w, C), pooled (B, C))`; pooled is the mean of the grid.

    `depths` and `widths` give the blocks and channels of each stage (ResNet-101: 3, 4, 23, 3 and 256, 512, 1024,
    2048, bottleneck); every stage but the first (with `stride_all` the first too) halves the size. `stem_pool` adds the
    original's 3 x 3 max-pooling after a 7 x 7 stem; without it the stem is 3 x 3 (small images). `norm` is "group" or
    "batch" (see above).
    """

    stem_width: int
    depths: tuple
    widths: tuple
    bottleneck: bool
    stem_pool: bool
    norm: str = "group"
    stride_first: bool = False
    stride_all: bool = False

    @nn.compact
    def __call__(self, pixels, deterministic=True):
        x = conv(self.stem_width, 7 if self.stem_pool else 3, 2, "stem")(pixels)
        x = nn.relu(norm_layer(self.norm, self.stem_width, "stem_norm")(x))
        if self.stem_pool:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for s, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for b in range(depth):
                stride = 2 if (s > 0 or self.stride_all) and b == 0 else 1
                name = f"stage_{s}_block_{b}"
                x = Residual(width, stride, self.bottleneck, self.norm, self.stride_first, name=name)(x)
        return x, x.mean((1, 2))
