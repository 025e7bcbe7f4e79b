"""The Transformer blocks that ViT (pre-norm) and BERT (post-norm) share. B items, L positions, C width."""

import flax.linen as nn


class SelfAttention(nn.Module):
    """Multi-head self-attention `(B, L, C) -> (B, L, C)`; positions where `mask` `(B, L)` is False are not attended."""

    heads: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, mask=None, deterministic=True):
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"width {width} is not divisible by {self.heads} heads")
        split = (self.heads, width // self.heads)
        q, k, v = (nn.DenseGeneral(split, name=name)(x) for name in ("query", "key", "value"))  # (B, L, H, C/H)
        dropout_rng = self.make_rng("dropout") if self.dropout and not deterministic else None
        x = nn.dot_product_attention(
            q,
            k,
            v,
            mask=None if mask is None else mask[:, None, None, :],
            dropout_rng=dropout_rng,
            dropout_rate=self.dropout,
            deterministic=deterministic,
        )
        return nn.DenseGeneral(width, axis=(-2, -1), name="out")(x)


class Block(nn.Module):
    """Attention and a two-layer MLP, each with a residual; normalised before (ViT) or after (BERT) each."""

    heads: int
    mlp_width: int
    pre_norm: bool
    dropout: float = 0.0
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x, mask=None, deterministic=True):
        drop = nn.Dropout(self.dropout, deterministic=deterministic)

        def attend(y):
            return drop(SelfAttention(self.heads, self.dropout, name="attention")(y, mask, deterministic))

        def mlp(y):
            y = nn.gelu(nn.Dense(self.mlp_width, name="mlp_in")(y), approximate=False)
            return drop(nn.Dense(x.shape[-1], name="mlp_out")(y))

        norm_1, norm_2 = (nn.LayerNorm(self.eps, name=name) for name in ("norm_1", "norm_2"))
        if self.pre_norm:
            x = x + attend(norm_1(x))
            return x + mlp(norm_2(x))
        x = norm_1(x + attend(x))
        return norm_2(x + mlp(x))
