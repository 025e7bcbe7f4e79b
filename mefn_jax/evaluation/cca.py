"""TODO."""

import dataclasses

import jax
import numpy as np

from mefn_jax.data import pipeline
from mefn_jax.data.split import Split
from mefn_jax.encoders.pooling import mean_pool
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.runtime.sharding import batch_sharding, from_full_copy, from_local_rows, local_rows, replicated, round_up


@dataclasses.dataclass(frozen=True)
class MeanFeatures:
    """Mean states of a split's images float32 `(I, X)` and captions `(C, Y)`, and each caption's image int `(C,)`."""

    images: np.ndarray
    texts: np.ndarray
    image_index: np.ndarray


@dataclasses.dataclass(frozen=True)
class CCA:
    """`(x - mean_x) A` and `(y - mean_y) B` are near each other for true pairs: `A (X, K)`, `B (Y, K)`, by falling
    correlation `(K,)`."""

    mean_x: np.ndarray
    mean_y: np.ndarray
    A: np.ndarray
    B: np.ndarray
    correlations: np.ndarray

    def projections(self, power: float, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `dim` columns of A and B, times their correlation to the `power`."""
        weights = self.correlations[:dim] ** power
        return self.A[:, :dim] * weights, self.B[:, :dim] * weights


def mean_features(evaluator: Evaluator, params, split: Split) -> MeanFeatures:
    """The states that the encoders project, averaged over an image's regions or a caption's words."""
    model, c = evaluator.model, evaluator.config
    size = round_up(c.eval.batch_size, evaluator.mesh.size)
    mine = local_rows(evaluator.mesh, size)

    def of_images(params, regions):
        return mean_pool(*model.image.apply({"params": params["image"]}, regions, method="backbone_features"))

    def of_texts(params, ids, mask):
        return mean_pool(*model.text.apply({"params": params["text"]}, ids, mask, method="backbone_features")[:2])

    everywhere, rows = replicated(evaluator.mesh), batch_sharding(evaluator.mesh)
    encode_images = jax.jit(of_images, in_shardings=(None, rows), out_shardings=everywhere)
    encode_texts = jax.jit(of_texts, in_shardings=(None, rows, rows), out_shardings=everywhere)
    images = [
        np.asarray(encode_images(params, from_local_rows(evaluator.mesh, batch)))[:number]
        for batch, number in pipeline.image_batches(split, None, size, c.data.threads, rows=mine)
    ]
    texts = [
        np.asarray(encode_texts(params, *from_full_copy(rows, (ids, mask))))[:number]
        for ids, mask, number in pipeline.caption_batches(split, evaluator.tokenizer, size)
    ]
    return MeanFeatures(np.concatenate(images), np.concatenate(texts), split.caption_image)


def fit_cca(found: MeanFeatures, ridge_x: float, ridge_y: float) -> CCA:
    """Regularised CCA of all (image, caption) pairs; ridges are in units of the features' mean variance. Raises
    DataError if all images, or all captions, are the same."""
    for what, features in (("images", found.images), ("captions", found.texts)):
        if not np.ptp(features, axis=0).any():
            raise DataError(
                f"all training {what} have the same features; look at them with python -m mefn_jax.show_data"
            )
    x, y = found.images.astype(np.float64), found.texts.astype(np.float64)
    captions = np.bincount(found.image_index, minlength=len(x))[:, None]  # an image counts once a caption
    mean_x, mean_y = (captions * x).sum(0) / len(y), y.mean(0)
    x, y = x - mean_x, y - mean_y
    of_image = np.zeros((len(x), y.shape[1]))
    np.add.at(of_image, found.image_index, y)
    whiten_x = _whitening(x.T @ (captions * x) / len(y), ridge_x)
    whiten_y = _whitening(y.T @ y / len(y), ridge_y)
    left, correlations, right = np.linalg.svd(whiten_x @ (x.T @ of_image / len(y)) @ whiten_y, full_matrices=False)
    return CCA(mean_x, mean_y, whiten_x @ left, whiten_y @ right.T, correlations)


def _whitening(covariance: np.ndarray, ridge: float) -> np.ndarray:
    """`(covariance + ridge)^(-1/2)`, the ridge in units of the mean variance."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 0) + ridge * values.mean()
    return (vectors / np.sqrt(values)) @ vectors.T


def check_supports_cca(config) -> None:
    """Raises ConfigError if a linear map cannot be the beginning of these encoders."""
    if config.image.arch != "regions" or config.image.regions.projection != "linear":
        raise ConfigError("train.init=cca is for image.arch=regions with image.regions.projection=linear")
    if config.text.arch == "gru":
        raise ConfigError("train.init=cca: text.arch=gru has no projection; choose another, or train.init=random")
    poolings = {"image.pooling": config.image.pooling, "text.pooling": config.text.pooling}
    for key, pooling in poolings.items():
        has_tower = key == "text.pooling" and config.text.arch != "cached"  # else the tower's own pooling is the mean
        if pooling != "mean" and (pooling != "tower" or has_tower):
            raise ConfigError(f"train.init=cca is of means, but {key} is {pooling}; set --config.{key}=mean")
