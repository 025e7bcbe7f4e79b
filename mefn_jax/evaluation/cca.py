"""CCA: canonical correlation analysis of mean features, for `train.init=cca` and for the CCA baseline.

It finds linear maps of images and of captions under which true pairs correlate most (docs/method.md, Eq. 11). I images,
C captions; X and Y are the widths of their features, K the number of dimensions.
"""

import dataclasses

import jax
import numpy as np

from mefn_jax.data import pipeline
from mefn_jax.data.split import Split
from mefn_jax.encoders.pooling import mean_pool
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.model import select_part
from mefn_jax.runtime.sharding import batch_sharding, from_full_copy, from_local_rows, local_rows, replicated, round_up


@dataclasses.dataclass(frozen=True)
class MeanFeatures:
    """Mean states of a split's images float32 `(I, X)` and captions `(C, Y)`, and each caption's image int `(C,)`."""

    images: np.ndarray
    texts: np.ndarray
    image_index: np.ndarray


@dataclasses.dataclass(frozen=True)
class CCA:
    """Two linear maps whose results correlate for true pairs: `(x - mean_x) A` and `(y - mean_y) B`.

    Attributes:
        mean_x, mean_y: means over all pairs, `(X,)` and `(Y,)`.
        A, B: `R_x U` and `R_y V` of docs/method.md, Eq. 11: `(X, K)` and `(Y, K)`, columns by falling correlation.
        correlations: `(K,)`, of each pair of columns.
    """

    mean_x: np.ndarray
    mean_y: np.ndarray
    A: np.ndarray
    B: np.ndarray
    correlations: np.ndarray

    def projections(self, power: float, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first `dim` columns of W_x and W_y of docs/method.md, Eq. 11, with `power` as q."""
        weights = self.correlations[:dim] ** power
        return self.A[:, :dim] * weights, self.B[:, :dim] * weights


def mean_features(evaluator: Evaluator, params, split: Split) -> MeanFeatures:
    """Returns the states that the encoders project, averaged over an image's regions or over a caption's words."""
    model, c = evaluator.model, evaluator.config
    size = round_up(c.eval.batch_size, evaluator.mesh.size)

    def average_regions(params, regions):
        return mean_pool(*model.image.apply(select_part(params, "image"), regions, method="backbone_features"))

    def average_words(params, ids, mask):
        return mean_pool(*model.text.apply(select_part(params, "text"), ids, mask, method="backbone_features")[:2])

    everywhere, rows = replicated(evaluator.mesh), batch_sharding(evaluator.mesh)
    encode_images = jax.jit(average_regions, in_shardings=(None, rows), out_shardings=everywhere)
    encode_texts = jax.jit(average_words, in_shardings=(None, rows, rows), out_shardings=everywhere)
    process_rows = local_rows(evaluator.mesh, size)
    images = [
        np.asarray(encode_images(params, from_local_rows(evaluator.mesh, batch)))[:number]
        for batch, number in pipeline.image_batches(split, None, size, c.data.threads, rows=process_rows)
    ]
    texts = [
        np.asarray(encode_texts(params, *from_full_copy(rows, (ids, mask))))[:number]
        for ids, mask, number in pipeline.caption_batches(split, evaluator.tokenizer, size)
    ]
    return MeanFeatures(np.concatenate(images), np.concatenate(texts), split.caption_image)


def fit_cca(features: MeanFeatures, ridge_x: float, ridge_y: float) -> CCA:
    """Fits regularized CCA to all (image, caption) pairs (docs/method.md, Eq. 11).

    Ridges are in units of the features' mean variance. Raises DataError if all images, or all captions, have the same
    features.
    """
    for kind, values in (("images", features.images), ("captions", features.texts)):
        if not np.ptp(values, axis=0).any():
            raise DataError(
                f"all training {kind} have the same features; look at them with python -m mefn_jax.show_data"
            )
    x, y = features.images.astype(np.float64), features.texts.astype(np.float64)
    captions = np.bincount(features.image_index, minlength=len(x))[:, None]  # an image counts once for each caption
    mean_x, mean_y = (captions * x).sum(0) / len(y), y.mean(0)
    x, y = x - mean_x, y - mean_y
    caption_sums = np.zeros((len(x), y.shape[1]))  # of each image's captions
    np.add.at(caption_sums, features.image_index, y)
    whiten_x = _compute_whitening(x.T @ (captions * x) / len(y), ridge_x)
    whiten_y = _compute_whitening(y.T @ y / len(y), ridge_y)
    left, correlations, right = np.linalg.svd(whiten_x @ (x.T @ caption_sums / len(y)) @ whiten_y, full_matrices=False)
    return CCA(mean_x, mean_y, whiten_x @ left, whiten_y @ right.T, correlations)


def _compute_whitening(covariance: np.ndarray, ridge: float) -> np.ndarray:
    """Returns `(covariance + ridge)^(-1/2)`, with the ridge in units of the mean variance."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 0) + ridge * values.mean()
    return (vectors / np.sqrt(values)) @ vectors.T


def check_supports_cca(config) -> None:
    """Raises ConfigError if CCA cannot initialize the projections of these encoders."""
    if config.image.arch != "regions":
        raise ConfigError(f"train.init=cca needs image.arch=regions, but it is {config.image.arch}")
    if config.text.arch == "gru":
        raise ConfigError("train.init=cca: text.arch=gru has no projection; choose another, or train.init=random")
    poolings = {"image.pooling": config.image.pooling, "text.pooling": config.text.pooling}
    for key, pooling in poolings.items():
        has_tower = key == "text.pooling" and config.text.arch != "cached"  # otherwise `tower` pools by the mean
        # GPO is a weighted mean in each dimension; it begins with random weights. ESA begins as the mean.
        if pooling not in ("mean", "gpo", "esa") and (pooling != "tower" or has_tower):
            raise ConfigError(f"train.init=cca uses means of features, but {key} is {pooling}; set --config.{key}=mean")
