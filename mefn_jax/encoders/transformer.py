"""Transformer shared by ViT, CLIP, SigLIP (pre-norm) and BERT (post-norm). B items, L positions, C width, H heads."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mefn_jax.features import MASKED_LOGIT
from mefn_jax.runtime.sharding import constrain_to_batch

# Activation checkpointing: none; keep only the outputs of matrix products; keep only the input of each block.
REMAT = {"none": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "blocks": None}


def with_remat(block, remat: str, deterministic: int):
    """Wraps `block`, a module class, in `nn.remat` by the policy `REMAT[remat]`.

    `deterministic` is the position of that argument of the module's call, counting self.
    """
    if remat == "none":
        return block
    return nn.remat(block, static_argnums=(deterministic,), policy=REMAT[remat])


def quick_gelu(x):
    """Computes CLIP's activation (Radford et al. 2021), an approximation of GELU."""
    return x * nn.sigmoid(1.702 * x)


tanh_gelu = functools.partial(nn.gelu, approximate=True)
ACTIVATIONS = {  # the keys are the names in Hugging Face configurations
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "quick_gelu": quick_gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}


class SelfAttention(nn.Module):
    """Multi-head self-attention `(B, L, C) -> (B, L, C)`. Positions where `mask` `(B, L)` is False are not attended to.

    `rotation`, cosines and sines `(L, C/H)`, rotates queries and keys (RoPE, Su et al. 2021). `bias` `(H, L, L)` is
    added to the logits.

    Attributes:
        heads: the number of heads; must divide C.
        dropout: rate on the attention weights.
        causal: no position attends to later ones.
        qkv_bias: query, key and value have a bias.
        key_bias: the key has one, too.
        dtype: of the computation.
    """

    heads: int
    dropout: float = 0.0
    causal: bool = False
    qkv_bias: bool = True
    key_bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, mask=None, deterministic=True, rotation=None, bias=None):
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"width {width} is not divisible by {self.heads} heads")
        size = width // self.heads
        # One matrix for all heads, because a product with a third axis is slower on CPUs.
        q, k, v = (
            nn.Dense(width, has_bias, self.dtype, name=name)(x).reshape(
                *x.shape[:2], self.heads, size
            )  # (B, L, H, C/H)
            for name, has_bias in (
                ("query", self.qkv_bias),
                ("key", self.qkv_bias and self.key_bias),
                ("value", self.qkv_bias),
            )
        )
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        # The softmax is computed in float32 whatever dtype is.
        logits = jnp.einsum("blhc,bmhc->bhlm", q, k, preferred_element_type=jnp.float32) / np.sqrt(size)
        if bias is not None:
            logits = logits + bias
        if mask is not None:
            logits = jnp.where(mask[:, None, None, :], logits, MASKED_LOGIT)
        if self.causal:
            logits = jnp.where(np.tril(np.ones(logits.shape[2:], bool)), logits, MASKED_LOGIT)
        weights = nn.Dropout(self.dropout, deterministic=deterministic)(nn.softmax(logits))  # (B, H, L, L)
        x = jnp.einsum("bhlm,bmhc->blhc", weights.astype(v.dtype), v)
        return nn.Dense(width, dtype=self.dtype, name="out")(x.reshape(*x.shape[:2], width))


def rotate(x, cosines, sines):
    """Rotates the two halves of each head's channels against each other, `(B, L, H, C/H)`, by angles whose cosines and
    sines are float32 `(L, C/H)` (RoPE)."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], -1)
    return (x * cosines[:, None] + turned * sines[:, None]).astype(x.dtype)


class Block(nn.Module):
    """Transformer block: attention and a two-layer MLP, each with a residual connection.

    Attributes:
        heads: the number of attention heads.
        mlp_width: hidden width of the MLP.
        pre_norm: normalizes before attention and MLP (ViT, CLIP); False: after each residual sum (BERT).
        dropout: rate in attention, after attention and after the MLP.
        skip: probability that training leaves a residual branch out of an item (`stochastic_depth`).
        eps: epsilon of the norms.
        activation: a name of ACTIVATIONS.
        gated: the MLP's hidden layer is multiplied by the activation of a second one (SwiGLU, Shazeer 2020); otherwise
            the activation is its own.
        layer_scale: each residual branch has a learned scale for each channel (Touvron et al. 2021).
        causal: as in `SelfAttention`, and so are qkv_bias, key_bias and dtype.
    """

    heads: int
    mlp_width: int
    pre_norm: bool
    dropout: float = 0.0
    skip: float = 0.0
    eps: float = 1e-6
    activation: str = "gelu"
    gated: bool = False
    layer_scale: bool = False
    causal: bool = False
    qkv_bias: bool = True
    key_bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, mask=None, deterministic=True, rotation=None, bias=None):
        drop = nn.Dropout(self.dropout, deterministic=deterministic)

        def finish(y, name):
            if self.layer_scale:
                y = y * self.param(name, nn.initializers.ones, y.shape[-1:]).astype(y.dtype)
            return stochastic_depth(drop(y), self.skip, deterministic)

        def attend(y):
            attention = SelfAttention(
                self.heads, self.dropout, self.causal, self.qkv_bias, self.key_bias, self.dtype, name="attention"
            )
            return finish(attention(y, mask, deterministic, rotation, bias), "layer_scale_1")

        def mlp(y):
            activate = ACTIVATIONS[self.activation]
            hidden = nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")(y)
            if self.gated:
                hidden = activate(nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp_gate")(y)) * hidden
            else:
                hidden = activate(hidden)
            return finish(nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(hidden), "layer_scale_2")

        norm_1, norm_2 = (nn.LayerNorm(self.eps, dtype=self.dtype, name=name) for name in ("norm_1", "norm_2"))
        if self.pre_norm:
            x = x + attend(norm_1(x))
            return x + mlp(norm_2(x))
        x = norm_1(x + attend(x))
        return norm_2(x + mlp(x))


def stochastic_depth(branch, rate: float, deterministic: bool):
    """Applies stochastic depth (Huang et al. 2016) to a residual branch `(B, ...)`.

    In training, the branch of an item is set to zero as a whole with probability `rate`, and divided by `1 - rate`
    otherwise. To be called within a module.
    """
    return nn.Dropout(rate, broadcast_dims=tuple(range(1, branch.ndim)), deterministic=deterministic)(branch)


def stochastic_depth_rate(last_rate: float, layer: int, layers: int) -> float:
    """Returns the rate of stochastic depth of layer `layer`, which rises linearly from 0 at the first layer to
    `last_rate` at the last."""
    return last_rate * layer / max(1, layers - 1)


class Transformer(nn.Module, kw_only=True):
    """Base class of Transformer towers: the sizes that they have in common, and their blocks.

    Attributes:
        width: C, the number of channels.
        layers: the number of blocks.
        heads: the number of attention heads.
        mlp_width: hidden width of the MLP.
        dropout: rate in attention, after attention and after the MLP (BERT: after the embeddings too).
        stochastic_depth: rate at the last layer (`stochastic_depth_rate`).
        activation: a name of ACTIVATIONS.
        eps: epsilon of the norms.
        dtype: of the computation, "float32" or "bfloat16"; parameters are float32.
        remat: a name of REMAT, which activations of the blocks are kept for the backward pass.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    activation: str = "gelu"
    eps: float = 1e-6
    dtype: str = "float32"
    remat: str = "none"

    def blocks(self, x, mask, deterministic, rotation=None, bias=None, **options):
        """Runs all blocks on `x` `(B, L, C)` and returns the same shape.

        `rotation` and `bias` are those of `SelfAttention`, `options` further attributes of `Block`. To be called within
        a compact method.
        """
        block = with_remat(Block, self.remat, deterministic=3)
        for k in range(self.layers):
            x = block(
                self.heads,
                self.mlp_width,
                dropout=self.dropout,
                skip=stochastic_depth_rate(self.stochastic_depth, k, self.layers),
                eps=self.eps,
                activation=self.activation,
                dtype=self.dtype,
                name=f"layer_{k}",
                **options,
            )(constrain_to_batch(x), mask, deterministic, rotation, bias)
        return constrain_to_batch(x)
