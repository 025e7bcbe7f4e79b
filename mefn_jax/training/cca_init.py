"""Initializes the projections by canonical correlation analysis (CCA), and MEFN's hub vectors by training items.

With a few thousand images, random projections overfit before they find what the frozen features of images and captions
share. Regularized CCA finds it in closed form (docs/method.md, Eq. 11; Hotelling 1936; for images and captions Klein et
al. 2015), and training continues from there.
"""

import jax.numpy as jnp
import numpy as np

from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.cca import check_supports_cca, fit_cca, mean_features
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.runtime.console import print0

MAX_IMAGES = 20_000  # training images that the CCA is fitted to, at most
# Ridges of images and captions, in units of the mean variance, and the power of the correlations that weight the
# dimensions. The values are the best of a grid on held-out images of Flickr8k (docs/results.md), for all data sets.
RIDGES, POWER = (10.0, 0.3), 0.5


def init_from_training_data(evaluator: Evaluator, params: dict, split: Split) -> dict:
    """Returns `params` with the projections of regions and words from a CCA of the training data (docs/method.md, Eq.
    11), with the mean and variance of the projections' inputs, and, if the matcher has hub vectors, with training items
    in their place. All processes compute the same.

    Raises ConfigError if the encoders have no such projections, or if `embed_dim` exceeds the width of the features.
    """
    check_supports_cca(evaluator.config)
    sample = split.first_images(MAX_IMAGES)
    print0(f"train.init=cca: fitting CCA to {sample.num_images:,} training images and {sample.num_captions:,} captions")
    features = mean_features(evaluator, params, sample)
    dim, width = evaluator.config.embed_dim, min(features.images.shape[1], features.texts.shape[1])
    if dim > width:
        raise ConfigError(f"train.init=cca gives at most {width} dimensions here, but embed_dim is {dim}")
    cca = fit_cca(features, *RIDGES)
    projections = (("image", "regions", cca.mean_x, features.images), ("text", "words", cca.mean_y, features.texts))
    params = dict(params)
    for (kind, name, mean, inputs), kernel in zip(projections, cca.projections(POWER, dim), strict=True):
        # Cosines ignore the scale of a projection. This one gives a learning rate the same effect on any features.
        kernel = kernel / np.sqrt(dim * np.mean(kernel**2))
        variance = np.full(len(mean), np.mean((inputs - mean) ** 2))
        params[kind] = params[kind] | {
            "input_norm": {"mean": jnp.float32(mean), "var": jnp.float32(variance)},
            name: {"kernel": jnp.float32(kernel), "bias": jnp.zeros(dim)},
        }
    if "backgrounds" in params["matcher"]:
        params["matcher"] = params["matcher"] | {"backgrounds": hub_vectors(evaluator, params, sample)}
    return params


def hub_vectors(evaluator: Evaluator, params: dict, split: Split) -> dict:
    """Returns initial hub vectors `{images (K, D), texts (K, D)}`: pooled embeddings of K training images and of K
    training captions, drawn by `train.seed`."""
    images, texts = evaluator.encode(params, split)
    number = evaluator.config.matcher.hub_vectors
    rng = np.random.default_rng(evaluator.config.train.seed)

    def sample_rows(pooled):
        return jnp.asarray(pooled[rng.choice(len(pooled), number, replace=len(pooled) < number)])

    return {"images": sample_rows(images.pooled), "texts": sample_rows(texts.pooled)}
