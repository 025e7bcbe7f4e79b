"""ResNet v1.5 (He et al. 2016; the stride sits on the 3 x 3), with two kinds of normalisation.

From scratch it has GroupNorm: no statistic crosses the batch, so that 1 and 8 devices agree (DESIGN.md 6). Groups have
16 channels: with the usual 32 groups a narrow network would normalise single channels, and lose colour with them.
Pretrained, it runs BatchNorm on its stored statistics.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mefn_jax.encoders.transformer import stochastic_depth, stochastic_depth_rate, with_remat
from mefn_jax.runtime.sharding import constrain_to_batch

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
        return x * factor.astype(x.dtype) + (bias - mean * factor).astype(x.dtype)


def make_norm(kind: str, width: int, dtype: str, name: str) -> nn.Module:
    """The normalisation of `width` channels: "batch", or "group" with groups of `GROUP_SIZE` channels (one group where
    there are fewer)."""
    if kind == "batch":
        return StoredBatchNorm(name=name)
    return nn.GroupNorm(max(1, width // GROUP_SIZE), dtype=dtype, name=name)


def convolve(x, kernel, strides, padding, **rest):
    """`jax.lax.conv_general_dilated`, a 1 x 1 as the matrix product that it is: on CPU, XLA's gradient of the
    convolution with respect to such a kernel can take several times as long."""
    if kernel.shape[:2] == (1, 1):
        return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **rest)


def conv(width: int, kernel: int, stride: int, dtype: str, name: str) -> nn.Conv:
    """A convolution padded by half its kernel on both sides, as PyTorch's are (SAME pads one side less)."""
    size, strides = (kernel, kernel), (stride, stride)
    return nn.Conv(
        width, size, strides, kernel // 2, use_bias=False, dtype=dtype, conv_general_dilated=convolve, name=name
    )


def max_pool_3x3(x):
    """The maxima of 3 x 3 windows at a stride of 2, padded by one: as a maximum of slices, whose gradient is cheap,
    where XLA's of a reduced window scatters one element after the other on CPU."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    height, width = x.shape[1] - 2, x.shape[2] - 2
    slices = [x[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    return functools.reduce(jnp.maximum, slices)


class Residual(nn.Module):
    """One residual block, `basic` (two 3 x 3) or `bottleneck` (1 x 1, 3 x 3, 1 x 1 at a quarter of the width), whose
    stride sits on the 3 x 3, or with `stride_in_1x1` on the first 1 x 1 (v1). `skip` is the chance that training leaves
    the branch out of an image (`skipped`)."""

    width: int
    stride: int
    bottleneck: bool
    norm: str = "group"
    stride_in_1x1: bool = False
    skip: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, deterministic=True):
        def normed(y, width, kernel, stride, name):
            y = conv(width, kernel, stride, self.dtype, name)(y)
            return make_norm(self.norm, width, self.dtype, name + "_norm")(y)

        if self.bottleneck:
            first, second = (self.stride, 1) if self.stride_in_1x1 else (1, self.stride)
            y = nn.relu(normed(x, self.width // 4, 1, first, "conv_1"))
            y = nn.relu(normed(y, self.width // 4, 3, second, "conv_2"))
            y = normed(y, self.width, 1, 1, "conv_3")
        else:
            y = nn.relu(normed(x, self.width, 3, self.stride, "conv_1"))
            y = normed(y, self.width, 3, 1, "conv_2")
        if x.shape[-1] != self.width or self.stride != 1:
            x = normed(x, self.width, 1, self.stride, "shortcut")
        return nn.relu(x + stochastic_depth(y, self.skip, deterministic))


class ResNet(nn.Module):
    """Normalised pixels `(B, H, W, 3)` -> `(grids [(B, h, w, C)], pooled (B, C))`: the stages' outputs, finest first
    (C2 to C5), and the mean of the last.

    `depths` and `widths` give the blocks and channels of each stage (ResNet-101: 3, 4, 23, 3 and 256, 512, 1024,
    2048, bottleneck); every stage but the first (with `downsample_first_stage` the first too) halves the size. `stem_pool` adds the
    original's 3 x 3 max-pooling after a 7 x 7 stem; without it the stem is 3 x 3 (small images). `norm` is "group" or
    "batch" (see above); stochastic_depth, dtype and remat are as in `Transformer`.
    """

    stem_width: int
    depths: tuple
    widths: tuple
    bottleneck: bool
    stem_pool: bool
    norm: str = "group"
    stride_in_1x1: bool = False
    downsample_first_stage: bool = False
    stochastic_depth: float = 0.0
    dtype: str = "float32"
    remat: str = "none"

    @nn.compact
    def __call__(self, pixels, deterministic=True):
        x = conv(self.stem_width, 7 if self.stem_pool else 3, 2, self.dtype, "stem")(pixels)
        x = nn.relu(make_norm(self.norm, self.stem_width, self.dtype, "stem_norm")(x))
        if self.stem_pool:
            x = max_pool_3x3(x)
        block = with_remat(Residual, self.remat, deterministic=2)
        grids, done = [], 0
        for s, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for b in range(depth):
                stride = 2 if (s > 0 or self.downsample_first_stage) and b == 0 else 1
                skip = stochastic_depth_rate(self.stochastic_depth, done, sum(self.depths))
                x = block(
                    width,
                    stride,
                    self.bottleneck,
                    self.norm,
                    self.stride_in_1x1,
                    skip,
                    self.dtype,
                    name=f"stage_{s}_block_{b}",
                )(constrain_to_batch(x), deterministic)
                done += 1
            grids.append(x)
        return grids, x.mean((1, 2))
