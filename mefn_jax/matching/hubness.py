"""Correction of scores for hubness (docs/method.md, Eqs. 34 and 35).

Some captions ("two people outside") are close to every image and would rank first for all of them: hubs. The corrected
score is `score(i, t) - weight (offset(i) + offset(t))` with

    offset(x) = ln( mean_k exp(scale cos(x, hub_k)) ) / scale

over K learned vectors B of the other kind, which stand for typical images or typical captions. As `scale` grows, the
offset approaches the largest cosine; as it falls to 0, the mean (CSLS, Conneau et al. 2018, uses the gallery itself,
Eq. 36). An offset depends on one item alone, so the score of a pair still depends on that pair alone.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mefn_jax.features import unit


class HubnessCorrection(nn.Module):
    """Hub vectors of both sides, which give the offsets of images and of texts (docs/method.md, Eqs. 34 and 35).

    Attributes:
        num_vectors: K, the learned vectors per side; a new run starts with training items in their place.
        init_scale: initial scale of the log-mean-exp, learned as a logarithm.
    """

    num_vectors: int
    init_scale: float

    @nn.compact
    def __call__(self, images, texts):
        """Returns the weighted offsets of images and of texts, float32 `(...)` each, from their embeddings `(..., D)`.
        The weight is learned and starts at 1."""
        normal, constant = nn.initializers.normal(1.0), nn.initializers.constant
        text_hubs = self.param("texts", normal, (self.num_vectors, images.shape[-1]))
        image_hubs = self.param("images", normal, (self.num_vectors, texts.shape[-1]))
        scale = jnp.exp(self.param("log_scale", constant(jnp.log(self.init_scale)), ()))
        weight = self.param("weight", constant(1.0), ())
        offsets = log_mean_exp_similarity(images, text_hubs, scale), log_mean_exp_similarity(texts, image_hubs, scale)
        return tuple(weight * offset for offset in offsets)


def log_mean_exp_similarity(pooled, hub_vectors, scale):
    """Returns the log-mean-exp of the cosines of unit vectors `(..., D)` with `hub_vectors (K, D)`, `(...)`
    (docs/method.md, Eq. 34). Only the directions of the hub vectors count."""
    # At full precision: an index, a ranking by certificate and the scores each compute the offsets of an item, on other
    # shapes or devices, and take them for the same numbers.
    cosines = jnp.matmul(pooled, unit(hub_vectors).T, precision=jax.lax.Precision.HIGHEST)
    return (jax.nn.logsumexp(scale * cosines, axis=-1) - jnp.log(len(hub_vectors))) / scale
