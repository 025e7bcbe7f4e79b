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


class HubnessBank(nn.Module):
    """Hub vectors of both sides, which give the offsets of images and of texts (docs/method.md, Eq. 34).

    Attributes:
        num_vectors: K, the learned vectors per side; random at first, or training items (`train.init=cca`).
    """

    num_vectors: int

    @nn.compact
    def __call__(self, images, texts, scale):
        """Returns the offsets of images and of texts, float32 `(...)` each, from pooled embeddings `(..., D)`."""
        normal = nn.initializers.normal(1.0)
        text_hubs = self.param("texts", normal, (self.num_vectors, images.shape[-1]))
        image_hubs = self.param("images", normal, (self.num_vectors, texts.shape[-1]))
        return log_mean_exp_similarity(images, text_hubs, scale), log_mean_exp_similarity(texts, image_hubs, scale)


def log_mean_exp_similarity(pooled, hub_vectors, scale):
    """Returns the log-mean-exp of the cosines of unit vectors `(..., D)` with `hub_vectors (K, D)`, `(...)`
    (docs/method.md, Eq. 34). Only the directions of the hub vectors count."""
    cosines = pooled @ unit(hub_vectors).T
    return (jax.nn.logsumexp(scale * cosines, axis=-1) - jnp.log(len(hub_vectors))) / scale
