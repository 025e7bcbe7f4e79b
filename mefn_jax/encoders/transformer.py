"""The Transformer that ViT, CLIP (pre-norm) and BERT (post-norm) share. B items, L positions, C width, H heads."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mefn_jax.runtime.sharding import constrain_to_batch

MASKED_LOGIT = -1e30  # a logit that gets no weight
# What is computed again: nothing; all but the outputs of matrix products; all but each block's input.
REMAT = {"none": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "blocks": None}


def with_remat(block, remat: str, deterministic: int):
    """`block`, a module class, so that its backward pass computes again what REMAT's `remat` says; `deterministic` is
    the place of this argument of its call, self counted."""
    if remat == "none":
        return block
    return nn.remat(block, static_argnums=(deterministic,), policy=REMAT[remat])


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
    qkv_bias: bool = True  # of query, key and value
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, mask=None, deterministic=True):
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"width {width} is not divisible by {self.heads} heads")
        size = width // self.heads
        # One matrix for all heads: a product with a third axis is slower on CPUs.
        q, k, v = (
            nn.Dense(width, self.qkv_bias, self.dtype, name=name)(x).reshape(
                *x.shape[:2], self.heads, size
            )  # (B, L, H, C/H)
            for name in ("query", "key", "value")
        )
        # The softmax is float32 whatever the rest is computed in.
        logits = jnp.einsum("blhc,bmhc->bhlm", q, k, preferred_element_type=jnp.float32) / np.sqrt(size)
        if mask is not None:
            logits = jnp.where(mask[:, None, None, :], logits, MASKED_LOGIT)
        if self.causal:
            logits = jnp.where(np.tril(np.ones(logits.shape[2:], bool)), logits, MASKED_LOGIT)
        weights = nn.Dropout(self.dropout, deterministic=deterministic)(nn.softmax(logits))  # (B, H, L, L)
        x = jnp.einsum("bhlm,bmhc->blhc", weights.astype(v.dtype), v)
        return nn.Dense(width, dtype=self.dtype, name="out")(x.reshape(*x.shape[:2], width))


class Block(nn.Module):
    """Attention and a two-layer MLP, each with a residual; normalised before (`pre_norm`: ViT, CLIP) or after (BERT)
    each. `skip` is the chance that training leaves a residual branch out of an item (see `skipped`)."""

    heads: int
    mlp_width: int
    pre_norm: bool
    dropout: float = 0.0
    skip: float = 0.0
    eps: float = 1e-6
    activation: str = "gelu"
    causal: bool = False
    qkv_bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, mask=None, deterministic=True):
        drop = nn.Dropout(self.dropout, deterministic=deterministic)

        def attend(y):
            attention = SelfAttention(
                self.heads, self.dropout, self.causal, self.qkv_bias, self.dtype, name="attention"
            )
            return stochastic_depth(drop(attention(y, mask, deterministic)), self.skip, deterministic)

        def mlp(y):
            y = ACTIVATIONS[self.activation](nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")(y))
            y = nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(y)
            return stochastic_depth(drop(y), self.skip, deterministic)

        norm_1, norm_2 = (nn.LayerNorm(self.eps, dtype=self.dtype, name=name) for name in ("norm_1", "norm_2"))
        if self.pre_norm:
            x = x + attend(norm_1(x))
            return x + mlp(norm_2(x))
        x = norm_1(x + attend(x))
        return norm_2(x + mlp(x))


def stochastic_depth(branch, chance: float, deterministic: bool):
    """Stochastic depth (Huang et al. 2016): in training, an item's whole residual branch `(B, ...)` is left out with
    this chance, and the others' are divided by `1 - chance`. Within a module."""
    return nn.Dropout(chance, broadcast_dims=tuple(range(1, branch.ndim)), deterministic=deterministic)(branch)


def stochastic_depth_rate(most: float, layer: int, layers: int) -> float:
    """Stochastic depth's chance for a layer: it rises linearly from 0 at the first to `most` at the last."""
    return most * layer / max(1, layers - 1)


class Transformer(nn.Module, kw_only=True):
    """The sizes that Transformer towers have in common, and their blocks.

    Attributes:
        width: C; layers, heads: their numbers; mlp_width: the hidden width of the blocks' MLP.
        dropout: in attention, and after attention and MLP (BERT: after the embeddings too).
        stochastic_depth: the chance of `skip_chance` at the last layer.
        activation: a name of ACTIVATIONS.
        eps: of the norms.
        dtype: what is computed in, "float32" or "bfloat16"; parameters are float32.
        remat: a name of REMAT: what of the blocks is computed again in the backward pass instead of kept.
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

    def blocks(self, x, mask, deterministic, **kind):
        """All blocks on `x` `(B, L, C)`; `kind` are pre_norm, causal and qkv_bias of `Block`. Within a compact method."""
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
                **kind,
            )(constrain_to_batch(x), mask, deterministic)
        return constrain_to_batch(x)
