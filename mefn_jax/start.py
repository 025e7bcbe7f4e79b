"""Begins from the training data: projections from a linear map, MEFN's background from training items.

With a few thousand images, random projections overfit before they have found what frozen features share; regularised
canonical correlation analysis finds that in closed form (Hotelling 1936; for images and captions Klein et al. 2015),
and training goes on from there. I images, C captions, X and Y their features' widths, D the joint space.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mefn_jax.data import pipeline
from mefn_jax.data.split import Split
from mefn_jax.encoders.pooling import mean
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluator import Evaluator
from mefn_jax.logs import say
from mefn_jax.sharding import by_rows, put_rows, put_whole, replicated, rows_here

IMAGES = 20_000  # the most training images that are looked at
# Ridges, in mean variances, and the power of the correlations that weight the dimensions: the best of a grid on
# held-out images of Flickr8k (docs/results.md), whatever the data here.
RIDGES, POWER = (10.0, 0.3), 0.5


@dataclasses.dataclass(frozen=True)
class Means:
    """Mean states of a split's images float32 `(I, X)` and captions `(C, Y)`, and each caption's image int `(C,)`."""

    images: np.ndarray
    texts: np.ndarray
    owner: np.ndarray


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """`(x - mean_x) A` and `(y - mean_y) B` are near each other for true pairs: `A (X, K)`, `B (Y, K)`, by falling
    correlation `(K,)`."""

    mean_x: np.ndarray
    mean_y: np.ndarray
    A: np.ndarray
    B: np.ndarray
    correlations: np.ndarray

    def weighted(self, power: float, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `dim` columns of A and B, times their correlation to the `power`."""
        weights = self.correlations[:dim] ** power
        return self.A[:, :dim] * weights, self.B[:, :dim] * weights


def means(evaluator: Evaluator, params, split: Split) -> Means:
    """The states that the encoders project, averaged over an image's regions or a caption's words."""
    model, c = evaluator.model, evaluator.config
    size = -(-c.eval.batch_size // evaluator.mesh.size) * evaluator.mesh.size
    mine = rows_here(evaluator.mesh, size)

    def of_images(params, regions):
        return mean(*model.image.apply({"params": params["image"]}, regions, method="states"))

    def of_texts(params, ids, mask):
        return mean(*model.text.apply({"params": params["text"]}, ids, mask, method="states")[:2])

    everywhere, rows = replicated(evaluator.mesh), by_rows(evaluator.mesh)
    encode_images = jax.jit(of_images, in_shardings=(None, rows), out_shardings=everywhere)
    encode_texts = jax.jit(of_texts, in_shardings=(None, rows, rows), out_shardings=everywhere)
    images = [
        np.asarray(encode_images(params, put_rows(evaluator.mesh, batch)))[:number]
        for batch, number in pipeline.image_batches(split, None, size, c.data.threads, rows=mine)
    ]
    texts = [
        np.asarray(encode_texts(params, *put_whole(rows, (ids, mask))))[:number]
        for ids, mask, number in pipeline.caption_batches(split, evaluator.tokenizer, size)
    ]
    return Means(np.concatenate(images), np.concatenate(texts), split.caption_image)


def fit(found: Means, ridge_x: float, ridge_y: float) -> LinearMap:
    """Regularised CCA of all (image, caption) pairs; ridges are in units of the features' mean variance. Raises
    DataError if all images, or all captions, are the same."""
    for what, features in (("images", found.images), ("captions", found.texts)):
        if not np.ptp(features, axis=0).any():
            raise DataError(
                f"all training {what} have the same features; look at them with python -m mefn_jax.data.show"
            )
    x, y = found.images.astype(np.float64), found.texts.astype(np.float64)
    captions = np.bincount(found.owner, minlength=len(x))[:, None]  # an image counts once a caption
    mean_x, mean_y = (captions * x).sum(0) / len(y), y.mean(0)
    x, y = x - mean_x, y - mean_y
    of_image = np.zeros((len(x), y.shape[1]))
    np.add.at(of_image, found.owner, y)
    whiten_x = _whitening(x.T @ (captions * x) / len(y), ridge_x)
    whiten_y = _whitening(y.T @ y / len(y), ridge_y)
    left, correlations, right = np.linalg.svd(whiten_x @ (x.T @ of_image / len(y)) @ whiten_y, full_matrices=False)
    return LinearMap(mean_x, mean_y, whiten_x @ left, whiten_y @ right.T, correlations)


def _whitening(covariance: np.ndarray, ridge: float) -> np.ndarray:
    """`(covariance + ridge)^(-1/2)`, the ridge in units of the mean variance."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 0) + ridge * values.mean()
    return (vectors / np.sqrt(values)) @ vectors.T


def from_training_data(evaluator: Evaluator, params: dict, split: Split) -> dict:
    """`params` with the projections of regions and words from a linear map of the training data, their inputs'
    statistics, and where the matcher has a background, its vectors from training items. Every process does the same.

    Raises ConfigError where there is no such projection, or it is wider than the features.
    """
    check(evaluator.config)
    seen = split.head(IMAGES)
    say(f"starting from a linear map of {seen.images:,} training images and {seen.captions:,} captions")
    found = means(evaluator, params, seen)
    dim, width = evaluator.config.embed_dim, min(found.images.shape[1], found.texts.shape[1])
    if dim > width:
        raise ConfigError(f"train.start=linear gives at most {width} dimensions here, but embed_dim is {dim}")
    linear = fit(found, *RIDGES)
    sides = (("image", "regions", linear.mean_x, found.images), ("text", "words", linear.mean_y, found.texts))
    params = dict(params)
    for (kind, name, centre, features), kernel in zip(sides, linear.weighted(POWER, dim), strict=True):
        # Lengths do not matter to cosines; this one makes a learning rate mean the same on any features.
        kernel = kernel / np.sqrt(dim * np.mean(kernel**2))
        variance = np.full(len(centre), np.mean((features - centre) ** 2))
        params[kind] = params[kind] | {
            "input_norm": {"mean": jnp.float32(centre), "var": jnp.float32(variance)},
            name: {"kernel": jnp.float32(kernel), "bias": jnp.zeros(dim)},
        }
    if "backgrounds" in params["matcher"]:
        params["matcher"] = params["matcher"] | {"backgrounds": background(evaluator, params, seen)}
    return params


def background(evaluator: Evaluator, params: dict, split: Split) -> dict:
    """The background's vectors `{images (K, D), texts (K, D)}`: pooled embeddings of training images and captions,
    drawn by the seed."""
    images, texts = evaluator.encode(params, split)
    number = evaluator.config.matcher.background
    rng = np.random.default_rng(evaluator.config.train.seed)

    def drawn(pooled):
        return jnp.asarray(pooled[rng.choice(len(pooled), number, replace=len(pooled) < number)])

    return {"images": drawn(images.pooled), "texts": drawn(texts.pooled)}


def check(config) -> None:
    """Raises ConfigError if a linear map cannot be the beginning of these encoders."""
    if config.image.arch != "regions" or config.image.regions.projection != "linear":
        raise ConfigError("train.start=linear is for image.arch=regions with image.regions.projection=linear")
    if config.text.arch == "gru":
        raise ConfigError("train.start=linear: text.arch=gru has no projection; choose another, or train.start=random")
    poolings = {"image.pooling": config.image.pooling, "text.pooling": config.text.pooling}
    for key, pooling in poolings.items():
        has_tower = key == "text.pooling" and config.text.arch != "words"  # else the tower's own pooling is the mean
        if pooling != "mean" and (pooling != "tower" or has_tower):
            raise ConfigError(f"train.start=linear is of means, but {key} is {pooling}; set --config.{key}=mean")
