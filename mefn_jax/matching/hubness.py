"""How well an image or a text matches anything at all, so that a score can say how much better it matches this.

A caption like "two people outside" is near every image, and takes the first places of all of them (a hub). What a pair
tells beyond that is its information gain: the score less the free energy of either side over a background,

    level(x) = ln( mean_k exp(scale cos(x, B_k)) ) / scale,

with K learned vectors B_k of the other kind, which stand for the images or captions that there are. A level is of one
item alone, so the score of (i, j) is still made of i and j and nothing else. As scale grows it is the nearest
background, as it falls to 0 the mean (compare CSLS, Conneau et al. 2018, whose background is the gallery itself).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mefn_jax.features import unit


class HubnessBank(nn.Module):
    """Levels of images and texts over each other's background: `pooled (..., D)` of both -> float32 `(...)` of both.

    Attributes:
        number: K, the vectors of either background. They begin at random; `start.py` takes training items instead.
    """

    num_vectors: int

    @nn.compact
    def __call__(self, images, texts, scale):
        normal = nn.initializers.normal(1.0)
        of_texts = self.param("texts", normal, (self.num_vectors, images.shape[-1]))
        of_images = self.param("images", normal, (self.num_vectors, texts.shape[-1]))
        return log_mean_exp_similarity(images, of_texts, scale), log_mean_exp_similarity(texts, of_images, scale)


def log_mean_exp_similarity(pooled, background, scale):
    """The free energy of unit vectors `(..., D)` over a background `(K, D)`, of which the directions count."""
    cosines = pooled @ unit(background).T
    return (jax.nn.logsumexp(scale * cosines, axis=-1) - jnp.log(len(background))) / scale
