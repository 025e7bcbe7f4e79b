"""VSE++'s matcher (Faghri et al. 2018): the cosine of the pooled embeddings."""

from mefn_jax.features import Features
from mefn_jax.matching.matcher import Matcher


class PooledCosine(Matcher):
    """All pairs' cosines of `pooled`, float32 `(I, T)`; no parameters."""

    def __call__(self, images: Features, texts: Features):
        return images.pooled @ texts.pooled.T

    def score_tile(self, regions, words):
        """The scores `(I, T)` of images and texts arranged for it (`sides.py`)."""
        return regions.pooled @ words.pooled.T
