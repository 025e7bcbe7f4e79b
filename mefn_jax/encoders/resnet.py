"""ResNet v1.5 (He et al. 2016, with the stride in the 3 x 3 convolution), with two kinds of normalization.

Trained from scratch, it uses GroupNorm: no statistic crosses the batch, so that 1 and 8 devices compute the same.
Groups have 16 channels. With the usual 32 groups, a narrow network would normalize single channels and lose color.
With pretrained weights, it runs BatchNorm on stored statistics.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mefn_jax.encoders.transformer import stochastic_depth, stochastic_depth_rate, with_remat
from mefn_jax.runtime.sharding import constrain_to_batch

GROUP_SIZE = 16


class StoredBatchNorm(nn.Module):
    """BatchNorm on stored statistics, `(x - mean) / sqrt(var + 1e-5) * scale + bias`.

    Scale and bias are trained. The statistics are variables of the collection `constants`.
    """

    @nn.compact
    def __call__(self, x):
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, (x.shape[-1],)
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean = self.variable("constants", "mean", jnp.zeros, shape).value
        var = self.variable("constants", "var", jnp.ones, shape).value
        factor = scale / jnp.sqrt(var + 1e-5)
        return x * factor.astype(x.dtype) + (bias - mean * factor).astype(x.dtype)


def make_norm(kind: str, width: int, dtype: str, name: str) -> nn.Module:
    """Returns the normalization of `width` channels: "batch", or "group" with groups of `GROUP_SIZE` channels (a single
    group if `width` is smaller)."""
    if kind == "batch":
        return StoredBatchNorm(name=name)
    return nn.GroupNorm(max(1, width // GROUP_SIZE), dtype=dtype, name=name)


def convolve(x, kernel, strides, padding, **rest):
    """Computes `jax.lax.conv_general_dilated`, but a 1 x 1 convolution as a matrix product.

    On a CPU, XLA's gradient of a convolution with respect to a 1 x 1 kernel can take several times as long. This was
    not measured on other platforms.
    """
    if kernel.shape[:2] == (1, 1):
        return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **rest)


def conv(width: int, kernel: int, stride: int, dtype: str, name: str) -> nn.Conv:
    """Returns a convolution padded by half its kernel on both sides, as in PyTorch ("SAME" pads one side less)."""
    size, strides = (kernel, kernel), (stride, stride)
    return nn.Conv(
        width, size, strides, kernel // 2, use_bias=False, dtype=dtype, conv_general_dilated=convolve, name=name
    )


def max_pool_3x3(x):
    """Computes 3 x 3 max-pooling with a stride of 2 and a padding of one pixel, as a maximum of nine slices.

    The gradient of a maximum of slices is cheap. On a CPU, XLA's gradient of a windowed reduction scatters one element
    after the other. This was not measured on other platforms.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    height, width = x.shape[1] - 2, x.shape[2] - 2
    slices = [x[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    return functools.reduce(jnp.maximum, slices)


class Residual(nn.Module):
    """Residual block of two 3 x 3 convolutions, or a bottleneck of 1 x 1, 3 x 3 and 1 x 1.

    Attributes:
        width: channels of the output; a bottleneck's first two convolutions have a quarter of them.
        stride: stride of the block.
        bottleneck: chooses the bottleneck.
        norm: "group" or "batch", see `make_norm`.
        stride_in_1x1: puts a bottleneck's stride in its first 1 x 1 (v1) instead of the 3 x 3 (v1.5).
        skip: probability that training leaves the residual branch out of an image (`stochastic_depth`).
        dtype: of the computation.
    """

    width: int
    stride: int
    bottleneck: bool
    norm: str = "group"
    stride_in_1x1: bool = False
    skip: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, deterministic=True):
        def convolve_and_normalize(z, width, kernel, stride, name):
            z = conv(width, kernel, stride, self.dtype, name)(z)
            return make_norm(self.norm, width, self.dtype, name + "_norm")(z)

        if self.bottleneck:
            first, second = (self.stride, 1) if self.stride_in_1x1 else (1, self.stride)
            y = nn.relu(convolve_and_normalize(x, self.width // 4, 1, first, "conv_1"))
            y = nn.relu(convolve_and_normalize(y, self.width // 4, 3, second, "conv_2"))
            y = convolve_and_normalize(y, self.width, 1, 1, "conv_3")
        else:
            y = nn.relu(convolve_and_normalize(x, self.width, 3, self.stride, "conv_1"))
            y = convolve_and_normalize(y, self.width, 3, 1, "conv_2")
        if x.shape[-1] != self.width or self.stride != 1:
            x = convolve_and_normalize(x, self.width, 1, self.stride, "shortcut")
        return nn.relu(x + stochastic_depth(y, self.skip, deterministic))


class ResNet(nn.Module):
    """ResNet: normalized pixels `(B, H, W, 3)` -> `(grids [(B, h, w, C)], pooled (B, C))`.

    Grids are the outputs of the stages, finest first (C2 to C5); `pooled` is the mean of the last grid.

    Attributes:
        stem_width: channels of the first convolution.
        depths: blocks of each stage (ResNet-101: 3, 4, 23, 3).
        widths: channels of each stage (ResNet-101: 256, 512, 1024, 2048).
        bottleneck: bottleneck blocks (as in ResNet-101) instead of two 3 x 3 convolutions.
        stem_pool: a 7 x 7 stem and 3 x 3 max-pooling, as in the original; False: a 3 x 3 stem for small images.
        norm: "group" or "batch", see `make_norm`.
        stride_in_1x1: as in `Residual`.
        downsample_first_stage: halves the size in the first stage too, as all later stages do.
        stochastic_depth: as in `Transformer`, and so are dtype and remat.
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
        grids, blocks_before = [], 0
        for s, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for b in range(depth):
                stride = 2 if (s > 0 or self.downsample_first_stage) and b == 0 else 1
                skip = stochastic_depth_rate(self.stochastic_depth, blocks_before, sum(self.depths))
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
                blocks_before += 1
            grids.append(x)
        return grids, x.mean((1, 2))
