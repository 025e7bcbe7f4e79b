"""Begins from the training data: projections from a linear map, MEFN's background from training items.

With a few thousand images, random projections overfit before they have found what frozen features share; regularised
canonical correlation analysis finds that in closed form (Hotelling 1936; for images and captions Klein et al. 2015),
and training goes on from there. I images, C captions, X and Y their features' widths, D the joint space.
"""

import jax.numpy as jnp
import numpy as np

from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.cca import check_supports_cca, fit_cca, mean_features
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.runtime.console import print0

MAX_IMAGES = 20_000  # the most training images that are looked at
# Ridges, in mean variances, and the power of the correlations that weight the dimensions: the best of a grid on
# held-out images of Flickr8k (docs/results.md), whatever the data here.
RIDGES, POWER = (10.0, 0.3), 0.5


def init_from_training_data(evaluator: Evaluator, params: dict, split: Split) -> dict:
    """`params` with the projections of regions and words from a linear map of the training data, their inputs'
    statistics, and where the matcher has a background, its vectors from training items. Every process does the same.

    Raises ConfigError where there is no such projection, or it is wider than the features.
    """
    check_supports_cca(evaluator.config)
    seen = split.first_images(MAX_IMAGES)
    print0(f"starting from a linear map of {seen.num_images:,} training images and {seen.num_captions:,} captions")
    found = mean_features(evaluator, params, seen)
    dim, width = evaluator.config.embed_dim, min(found.images.shape[1], found.texts.shape[1])
    if dim > width:
        raise ConfigError(f"train.init=cca gives at most {width} dimensions here, but embed_dim is {dim}")
    linear = fit_cca(found, *RIDGES)
    sides = (("image", "regions", linear.mean_x, found.images), ("text", "words", linear.mean_y, found.texts))
    params = dict(params)
    for (kind, name, centre, features), kernel in zip(sides, linear.projections(POWER, dim), strict=True):
        # Lengths do not matter to cosines; this one makes a learning rate mean the same on any features.
        kernel = kernel / np.sqrt(dim * np.mean(kernel**2))
        variance = np.full(len(centre), np.mean((features - centre) ** 2))
        params[kind] = params[kind] | {
            "input_norm": {"mean": jnp.float32(centre), "var": jnp.float32(variance)},
            name: {"kernel": jnp.float32(kernel), "bias": jnp.zeros(dim)},
        }
    if "backgrounds" in params["matcher"]:
        params["matcher"] = params["matcher"] | {"backgrounds": hub_vectors(evaluator, params, seen)}
    return params


def hub_vectors(evaluator: Evaluator, params: dict, split: Split) -> dict:
    """The background's vectors `{images (K, D), texts (K, D)}`: pooled embeddings of training images and captions,
    drawn by the seed."""
    images, texts = evaluator.encode(params, split)
    number = evaluator.config.matcher.hub_vectors
    rng = np.random.default_rng(evaluator.config.train.seed)

    def drawn(pooled):
        return jnp.asarray(pooled[rng.choice(len(pooled), number, replace=len(pooled) < number)])

    return {"images": drawn(images.pooled), "texts": drawn(texts.pooled)}
