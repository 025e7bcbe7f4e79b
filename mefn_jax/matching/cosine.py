"""VSE++'s matcher (Faghri et al. 2018): the cosine of the pooled embeddings."""

import flax.linen as nn

from mefn_jax.features import Features


class PooledCosine(nn.Module):
    """All pairs' cosines of `pooled`, float32 `(I, T)`; no parameters."""

    def __call__(self, images: Features, texts: Features):
        return images.pooled @ texts.pooled.T

    def tile(self, regions, words):
        """The scores `(I, T)` of images and texts arranged for it (`sides.py`)."""
        return regions.pooled @ words.pooled.T

    def coarse(self, features: Features):
        """The vector for shortlists `(B, D)`."""
        return features.pooled
