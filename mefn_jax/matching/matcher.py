"""Contract of a matcher: how a system scores all pairs of encoded images and texts."""

import flax.linen as nn

from mefn_jax.features import Features


class Matcher(nn.Module):
    """Base class of matchers. Subclass it, define `__call__`, and add a line to `MODELS` of `model.py`.

    A matcher may also define the following methods; all other code uses those that it finds:
        score_tile(regions, words) -> (I, T): the same scores from the layouts of `scoring/layouts.py`, before the
            hubness offsets are subtracted. Evaluation then packs the captions, which is faster.
        hub_offsets(images, texts) -> ((I,), (T,)): the amounts subtracted from all scores of an image and of a text.
        explain(image, text) -> dict: the terms of one pair, as `MEFN.explain` returns them; pairs can then be drawn.
        scalars() -> dict: learned scalars by name, for the log.
    """

    def __call__(self, images: Features, texts: Features):
        """Returns the scores of all pairs, float32 `(I, T)`: cosine scale, higher is better, differentiable."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(images, texts)")

    def embed(self, features: Features):
        """Returns one vector for each item, float32 `(B, D)`, for candidates and indexes: the pooled embedding."""
        return features.pooled
