"""A random explanation of a pair, for the tests of pictures."""

import numpy as np

from mefn_jax.encoders.grids import grid_boxes
from mefn_jax.reports.explanation import Explanation


def random_explanation(words, regions=9, side=(300, 360), boxes=True, entropies=True) -> Explanation:
    """Returns an explanation with random terms of these words, `regions` regions and a photograph of noise of shape
    `side`, without a photograph, boxes or entropies if asked."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.dirichlet(np.ones(shape[0]), shape[1:]).T  # noqa: E731
    boxes = np.concatenate([grid_boxes(3, 3), grid_boxes(7, 8)])[:regions] if boxes else None
    photo = rng.integers(0, 256, (*side, 3), np.uint8) if side else None
    region_weights, word_weights, attention = draw(regions), draw(len(words)), draw(regions, len(words))
    pair = " ".join(words), "test: image 1", words, photo, boxes, attention
    if not entropies:
        return Explanation(*pair, {"score": 0.5})
    values = {"score": 0.5, "local": 0.4, "global": 0.6, "gate": 0.5, "MFE": 3.0, "lambda": 9.0, "kappa": 4.0}
    values |= {"mean_entropy": 0.9, "evidence": -0.18, "evidence_weight": 0.2, "evidence_lambda": 12.0}
    return Explanation(*pair, values, rng.random((regions, len(words))), region_weights, word_weights)
