"""Matcher of dual encoders (VSE++, Faghri et al. 2018; CLIP, Radford et al. 2021): cosine of the pooled embeddings."""

from mefn_jax.features import Features
from mefn_jax.matching.matcher import Matcher


class PooledCosine(Matcher, kw_only=True):
    """Matcher without parameters: the cosines of `pooled` for all pairs (docs/method.md, Eq. 40)."""

    is_dual_encoder = True

    def score(self, images: Features, texts: Features):
        """Returns the scores of all pairs, float32 `(I, T)`."""
        return images.pooled @ texts.pooled.T

    def score_tile(self, products, regions, words):
        """Returns the scores `(I, T)` of one tile."""
        return products.pooled
