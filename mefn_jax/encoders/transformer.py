"""The Transformer blocks that ViT, CLIP (pre-norm) and BERT (post-norm) share. B items, L positions, C width."""

import functools

import flax.linen as nn


def quick_gelu(x):
    """CLIP's activation (Radford et al. 2021)."""
    return x * nn.sigmoid(1.702 * x)


tanh_gelu = functools.partial(nn.gelu, approximate=True)
ACTIVATIONS = {  # by their names in Hugging Face configurations
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "quick_gelu": quick_gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}


class SelfAttention(nn.Module):
    """Multi-head self-attention `(B, L, C) -> (B, L, C)`; positions where `mask` `(B, L)` is False are not attended,
    nor, if `causal`, are later ones."""

    heads: int
    dropout: float = 0.0
    causal: bool = False
    bias: bool = True  # of query, key and value

    @nn.compact
    def __call__(self, x, mask=None, deterministic=True):
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"width {width} is not divisible by {self.heads} heads")
        split = (self.heads, width // self.heads)
        q, k, v = (nn.DenseGeneral(split, use_bias=self.bias, name=name)(x) for name in ("query", "key", "value"))
        # q, k, v (B, L, H, C/H)
        allowed = None if mask is None else mask[:, None, None, :]
        if self.causal:
            allowed = nn.combine_masks(allowed, nn.make_causal_mask(x[..., 0], dtype=bool), dtype=bool)
        dropout_rng = self.make_rng("dropout") if self.dropout and not deterministic else None
        x = nn.dot_product_attention(
            q,
            k,
            v,
            mask=allowed,
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
    activation: str = "gelu"
    causal: bool = False
    bias: bool = True

    @nn.compact
    def __call__(self, x, mask=None, deterministic=True):
        drop = nn.Dropout(self.dropout, deterministic=deterministic)

        def attend(y):
            attention = SelfAttention(self.heads, self.dropout, self.causal, self.bias, name="attention")
            return drop(attention(y, mask, deterministic))

        def mlp(y):
            y = ACTIVATIONS[self.activation](nn.Dense(self.mlp_width, name="mlp_in")(y))
            return drop(nn.Dense(x.shape[-1], name="mlp_out")(y))

        norm_1, norm_2 = (nn.LayerNorm(self.eps, name=name) for name in ("norm_1", "norm_2"))
        if self.pre_norm:
            x = x + attend(norm_1(x))
            return x + mlp(norm_2(x))
        x = norm_1(x + attend(x))
        return norm_2(x + mlp(x))
