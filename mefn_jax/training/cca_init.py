"""Initializes a run from its training data: projections by CCA, hub vectors and a matcher's constants by items.

With a few thousand images, random projections overfit before they find what the frozen features of images and captions
share. Regularized CCA finds it in closed form (docs/method.md, Eq. 11; Hotelling 1936; for images and captions Klein et
al. 2015), and training continues from there.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.cca import check_supports_cca, fit_cca, mean_features
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.matching.cosine import PooledCosine
from mefn_jax.model import split_constants
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.multihost import broadcast_arrays

MAX_IMAGES = 20_000  # training images that the CCA is fitted to, at most
# Ridges of images and captions, in units of the mean variance, and the power of the correlations that weight the
# dimensions. The values are the best of a grid on held-out images of Flickr8k (docs/results.md), for all data sets.
RIDGES, POWER = (10.0, 0.3), 0.5
# Paths of an encoder's parameters that begin at 0, so that the pooled embedding is the projected mean at the start: the
# last layer of a projection's residual MLP, and the map of ESA's pooling.
ZEROED = r"^(mlp_out|pooling/esa/attention)/"


def init_from_training_data(evaluator: Evaluator, variables: dict, split: Split) -> dict:
    """Returns the variables of a new run with what begins as a function of the training data: with train.init=cca the
    projections; the hub vectors, if there is a hubness correction; and the matcher's constants, if it has some. All
    processes compute the same. Raises ConfigError as `init_projections` does."""
    model, sample = evaluator.model, split.first_images(MAX_IMAGES)
    if evaluator.config.train.init == "cca":
        variables = init_projections(evaluator, variables, sample)
    if model.matcher.defines("initial_constants"):
        variables = variables | {"constants": variables["constants"] | init_matcher(evaluator, variables, sample)}
    if model.hubness is not None:
        variables = variables | {"hubness": variables["hubness"] | hub_vectors(evaluator, variables, sample)}
    return variables


def init_projections(evaluator: Evaluator, variables: dict, split: Split) -> dict:
    """Returns the variables with the projections of regions and words from a CCA of a split (docs/method.md, Eq. 11),
    and with the mean and variance of the projections' inputs among the constants. Raises ConfigError if the encoders
    have no such projections, or if `embed_dim` exceeds the width of the features."""
    check_supports_cca(evaluator.config)
    print0(f"train.init=cca: fitting CCA to {split.num_images:,} training images and {split.num_captions:,} captions")
    features = mean_features(evaluator, variables, split)
    dim, width = evaluator.config.embed_dim, min(features.images.shape[1], features.texts.shape[1])
    if dim > width:
        raise ConfigError(f"train.init=cca gives at most {width} dimensions here, but embed_dim is {dim}")
    cca = fit_cca(features, *RIDGES)
    projections = (("image", "regions", cca.mean_x, features.images), ("text", "words", cca.mean_y, features.texts))
    params, constants = split_constants(variables)
    for (kind, name, mean, inputs), kernel in zip(projections, cca.projections(POWER, dim), strict=True):
        # Cosines ignore the scale of a projection. This one gives a learning rate the same effect on any features.
        kernel = kernel / np.sqrt(dim * np.mean(kernel**2))
        variance = np.full(len(mean), np.mean((inputs - mean) ** 2))
        statistics = {"input_norm": {"mean": jnp.float32(mean), "var": jnp.float32(variance)}}
        constants = constants | {kind: constants[kind] | statistics}
        projection = {"kernel": jnp.float32(kernel), "bias": jnp.zeros(dim)}
        params = params | {kind: zero_residuals(params[kind]) | {name: projection}}
    return params | {"constants": constants}


def zero_residuals(params: dict) -> dict:
    """Returns the parameters of an encoder with those that ZEROED names set to 0."""

    def zero(path, parameter):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.zeros_like(parameter) if re.search(ZEROED, name) else parameter

    return jax.tree_util.tree_map_with_path(zero, params)


def init_matcher(evaluator: Evaluator, variables: dict, split: Split) -> dict:
    """Returns the matcher's `initial_constants` of a split, as `{"matcher": constants}`. The items are encoded without
    the matcher's own transforms, which may need the constants."""
    matcher = evaluator.model.matcher
    if "matcher" not in variables["constants"]:  # an ablation of a matcher that has some
        return {}
    print0(f"computing constants of the matcher from {split.num_images:,} training images")
    without_transforms = dataclasses.replace(evaluator.model, matcher=PooledCosine(), hubness=None)
    encoder = dataclasses.replace(evaluator, model=without_transforms)
    images, texts = encoder.encode(variables | {"matcher": {}}, split)
    items = images, texts, split.caption_image, split.all_captions(), evaluator.config.train.seed
    # Hosts may round differently, and a cluster of regions may then be another one.
    constants = broadcast_arrays(lambda: matcher.initial_constants(*items), variables["constants"]["matcher"])
    return {"matcher": jax.tree.map(jnp.asarray, constants)}


def hub_vectors(evaluator: Evaluator, variables: dict, split: Split) -> dict:
    """Returns initial hub vectors `{images (K, D), texts (K, D)}`: embeddings of K training images and of K training
    captions, drawn by `train.seed`."""
    number = evaluator.config.matcher.hub_vectors
    rng = np.random.default_rng(evaluator.config.train.seed)

    def sample_rows(embeddings):
        return jnp.asarray(embeddings[rng.choice(len(embeddings), number, replace=len(embeddings) < number)])

    images, texts = (evaluator.embed(variables, features) for features in evaluator.encode(variables, split))
    return {"images": sample_rows(images), "texts": sample_rows(texts)}
