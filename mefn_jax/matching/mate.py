"""MATE's matcher (Zhou & Wang 2025) as read in docs/method.md, section 19: a fusion network on every pair of an image
and a text.

`fuse_pairs` is the network in its readable form. Scores of many pairs take `fuse_prepared`: the first layer begins with
an affine map of [v; t], which is a sum of one for v and one for t, so both are made once for each item. Letters:
I images, T texts, D dimensions, H the width of the MLP.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mefn_jax.features import Features, safe_norm, unit
from mefn_jax.matching.matcher import Matcher

FUSION_EPS = 1e-5  # of the norms, as in PyTorch's TransformerEncoder


@flax.struct.dataclass
class Affine:
    """An affine map of vectors: `kernel (A, B)` and `bias (B,)`."""

    kernel: jax.Array
    bias: jax.Array

    def __call__(self, x):
        """Returns the map of vectors `(..., A)`, `(..., B)`."""
        return x @ self.kernel + self.bias


@flax.struct.dataclass
class Norm:
    """A layer norm: `scale` and `bias`, `(W,)` each."""

    scale: jax.Array
    bias: jax.Array

    def __call__(self, x):
        """Returns vectors `(..., W)` of mean 0 and variance 1, scaled and shifted."""
        x = x - jnp.mean(x, -1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + FUSION_EPS) * self.scale + self.bias


@flax.struct.dataclass
class FusionWeights:
    """Weights of one layer of the fusion network, W = 2D.

    Attributes:
        value, output: the maps W -> W of an attention over a single key, whose weight is 1.
        attention_norm: the norm after it.
        hidden, back: the maps W -> H -> W of the MLP.
        mlp_norm: the norm after it.
    """

    value: Affine
    output: Affine
    attention_norm: Norm
    hidden: Affine
    back: Affine
    mlp_norm: Norm

    def attend(self, x):
        """Returns `x + O (V x + b_V) + b_O` of vectors `(..., W)` (docs/method.md, Eq. 96)."""
        return x + self.output(self.value(x))

    def transform(self, x):
        """Returns the layer of vectors `(..., W)` (docs/method.md, Eqs. 96 and 97)."""
        x = self.attention_norm(self.attend(x))
        return self.mlp_norm(x + self.back(nn.relu(self.hidden(x))))


class FusionLayer(nn.Module):
    """Parameters of one layer of the fusion network, with an MLP of width `mlp_width`."""

    mlp_width: int

    @nn.compact
    def __call__(self, width: int) -> FusionWeights:
        """Returns the weights for vectors of a width."""

        def affine(name, inputs, outputs):
            kernel = self.param(f"{name}_kernel", nn.initializers.xavier_uniform(), (inputs, outputs))
            return Affine(kernel, self.param(f"{name}_bias", nn.initializers.zeros, (outputs,)))

        def norm(name):
            scale = self.param(f"{name}_scale", nn.initializers.ones, (width,))
            return Norm(scale, self.param(f"{name}_bias", nn.initializers.zeros, (width,)))

        return FusionWeights(
            value=affine("value", width, width),
            output=affine("output", width, width),
            attention_norm=norm("attention_norm"),
            hidden=affine("hidden", width, self.mlp_width),
            back=affine("back", self.mlp_width, width),
            mlp_norm=norm("mlp_norm"),
        )


@flax.struct.dataclass
class PreparedItems:
    """Items of one kind as `fuse_prepared` takes them.

    Attributes:
        pooled: float32 `(..., D)`, the pooled embeddings.
        attended: float32 `(..., 2D)`, this kind's part of the first layer's attention, with mean 0.
        hidden: float32 `(..., H)`, `attended` through the first norm's scale and the MLP's first matrix.
    """

    pooled: jax.Array
    attended: jax.Array
    hidden: jax.Array


class MATE(Matcher, kw_only=True):
    """Matcher of MATE: the scores of all pairs, in [-1, 1] (docs/method.md, Eqs. 95 to 101).

    Attributes:
        layers: number of layers of the fusion network.
        mlp_width: width of their MLPs.
        share: share g of the fused embeddings in the score.
    """

    layers: int = 6
    mlp_width: int = 2048
    share: float = 0.1

    @nn.compact
    def _weights(self, embed_dim: int) -> list[FusionWeights]:
        """Returns the weights of all layers for embeddings of `embed_dim` dimensions."""
        return [FusionLayer(self.mlp_width, name=f"layer_{k}")(2 * embed_dim) for k in range(self.layers)]

    def score(self, images: Features, texts: Features):
        """Returns the scores of all pairs, float32 `(I, T)`."""
        by_image, by_text = self.prepare_images(images), self.prepare_texts(texts)
        return self.score_pairs(jax.tree.map(lambda x: x[:, None], by_image), by_text)

    def prepare_images(self, images: Features) -> PreparedItems:
        """Returns images as `score_pairs` takes them."""
        first, v = self._weights(images.pooled.shape[-1])[0], images.pooled
        return prepare_items(first, v, first.attend(jnp.concatenate([v, jnp.zeros_like(v)], -1)))

    def prepare_texts(self, texts: Features) -> PreparedItems:
        """Returns texts as `score_pairs` takes them. The constant term of the first layer is in the images' part."""
        first, t = self._weights(texts.pooled.shape[-1])[0], texts.pooled
        zeros = jnp.zeros_like(t)
        constant = first.attend(jnp.zeros(2 * t.shape[-1]))
        return prepare_items(first, t, first.attend(jnp.concatenate([zeros, t], -1)) - constant)

    def score_pairs(self, images: PreparedItems, texts: PreparedItems):
        """Returns the scores of pairs of prepared items, whose leading axes are broadcast, float32 `(...)`."""
        y = fuse_prepared(self._weights(images.pooled.shape[-1]), images, texts)
        return score_fused(images.pooled, texts.pooled, y, self.share)

    def floats_per_pair(self, images: Features, texts: Features) -> int:
        """Returns the largest number of float32 values that a pair takes at once."""
        return max(2 * images.pooled.shape[-1], self.mlp_width)

    def score_bound(self) -> tuple[float, float]:
        """Returns the factor and the radius of the interval that holds every score (docs/method.md, Eq. 101)."""
        return (1 - self.share) ** 2, self.share * (1 - self.share) * 2**0.5 + self.share**2 / 2

    def train_score(self, images: Features, texts: Features):
        """Returns the cosines of the pooled embeddings, float32 `(I, T)`: the loss fuses a few pairs on its own."""
        return images.pooled @ texts.pooled.T

    def fused_similarity(self, image_vectors, text_vectors):
        """Returns the cosines of the fused halves of pairs of embeddings `(..., D)`, float32 `(...)` (docs/method.md,
        Eq. 100)."""
        return cosine_of_halves(fuse_pairs(self._weights(image_vectors.shape[-1]), image_vectors, text_vectors))


def fuse_pairs(layers: list[FusionWeights], v, t):
    """Returns the fused vectors of pairs of embeddings `(..., D)` before they are scaled to unit length, `(..., 2D)`
    (docs/method.md, Eqs. 95 to 97)."""
    x = jnp.concatenate([v, t], -1)
    for layer in layers:
        x = layer.transform(x)
    return x


def prepare_items(first: FusionWeights, pooled, attended) -> PreparedItems:
    """Returns PreparedItems from the pooled embeddings `(B, D)` and their part of the attention `(B, 2D)`."""
    attended = attended - jnp.mean(attended, -1, keepdims=True)
    return PreparedItems(pooled, attended, (attended * first.attention_norm.scale) @ first.hidden.kernel)


def fuse_prepared(layers: list[FusionWeights], images: PreparedItems, texts: PreparedItems):
    """Returns `fuse_pairs` of pairs of prepared items, whose leading axes are broadcast, `(..., 2D)` (docs/method.md,
    Eq. 102)."""
    first, *rest = layers
    norm = first.attention_norm
    attended = images.attended + texts.attended
    inverse = jax.lax.rsqrt(jnp.mean(attended * attended, -1, keepdims=True) + FUSION_EPS)  # (..., 1)
    hidden = inverse * (images.hidden + texts.hidden) + first.hidden(norm.bias)
    x = inverse * attended * norm.scale + norm.bias
    x = first.mlp_norm(x + first.back(nn.relu(hidden)))
    for layer in rest:
        x = layer.transform(x)
    return x


def score_fused(v, t, y, share: float):
    """Returns the scores `(...)` of pairs of embeddings `(..., D)` and their fused vectors `y (..., 2D)`
    (docs/method.md, Eq. 99)."""
    p, q = jnp.split(unit(y), 2, -1)
    # Sums of products, which no device rounds to bfloat16: the bound holds to float32's precision.
    cross, fused = jnp.sum(v * q + t * p, -1), jnp.sum(p * q, -1)
    return (1 - share) ** 2 * jnp.sum(v * t, -1) + share * (1 - share) * cross + share**2 * fused


def cosine_of_halves(y):
    """Returns the cosine of the two halves of vectors `(..., 2D)`, `(...)`; 0 if one is zero."""
    p, q = jnp.split(y, 2, -1)
    norms = safe_norm(p) * safe_norm(q)
    return jnp.sum(p * q, -1) / jnp.where(norms > 0, norms, 1.0)
