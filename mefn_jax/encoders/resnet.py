"""ResNet v1.5 (He et al. 2016; the stride sits on the 3 x 3) with GroupNorm, for training from scratch.

GroupNorm instead of BatchNorm: no statistic crosses the batch, so that 1 and 8 devices agree (DESIGN.md 6). Groups
have 16 channels: with the usual 32 groups a narrow network would normalise single channels, and lose colour with them.
"""

import flax.linen as nn

GROUP_SIZE = 16


def group_norm(width: int, name: str) -> nn.GroupNorm:
    """GroupNorm with groups of `GROUP_SIZE` channels, or one group where there are fewer."""
    return nn.GroupNorm(max(1, width // GROUP_SIZE), name=name)


class Residual(nn.Module):
    """One residual block, `basic` (two 3 x 3) or `bottleneck` (1 x 1, 3 x 3, 1 x 1 at a quarter of the width)."""

    width: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x):
        def conv(y, width, kernel, stride, name):
            y = nn.Conv(width, (kernel, kernel), (stride, stride), use_bias=False, name=name)(y)
            return group_norm(width, name + "_norm")(y)

        if self.bottleneck:
            y = nn.relu(conv(x, self.width // 4, 1, 1, "conv_1"))
            y = nn.relu(conv(y, self.width // 4, 3, self.stride, "conv_2"))
            y = conv(y, self.width, 1, 1, "conv_3")
        else:
            y = nn.relu(conv(x, self.width, 3, self.stride, "conv_1"))
            y = conv(y, self.width, 3, 1, "conv_2")
        if x.shape != y.shape:
            x = conv(x, self.width, 1, self.stride, "shortcut")
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Normalised pixels `(B, H, W, 3)` -> `(grid (B, h, w, C), pooled (B, C))`; pooled is the mean of the grid.

    `depths` and `widths` give the blocks and channels of each stage (ResNet-101: 3, 4, 23, 3 and 256, 512, 1024,
    2048, bottleneck); every stage but the first halves the size. `stem_pool` adds the original's 3 x 3 max-pooling
    after a 7 x 7 stem; without it the stem is 3 x 3 (small images).
    """

    stem_width: int
    depths: tuple
    widths: tuple
    bottleneck: bool
    stem_pool: bool

    @nn.compact
    def __call__(self, pixels, deterministic=True):
        kernel = 7 if self.stem_pool else 3
        x = nn.Conv(self.stem_width, (kernel, kernel), (2, 2), use_bias=False, name="stem")(pixels)
        x = nn.relu(group_norm(self.stem_width, "stem_norm")(x))
        if self.stem_pool:
            x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for s, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for b in range(depth):
                stride = 2 if s > 0 and b == 0 else 1
                x = Residual(width, stride, self.bottleneck, name=f"stage_{s}_block_{b}")(x)
        return x, x.mean((1, 2))
