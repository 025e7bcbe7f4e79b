"""CCA against a direct solution."""

import numpy as np
import pytest

from mefn_jax.errors import DataError
from mefn_jax.evaluation import cca
from mefn_jax.evaluation.cca import MeanFeatures


def test_fit_cca_equals_direct_solution():
    """The directions solve the generalized eigenproblem of regularized CCA, where an image counts once per caption."""
    rng = np.random.default_rng(0)
    image_index = np.repeat(np.arange(30), rng.integers(1, 5, 30))
    images = rng.normal(size=(30, 4))
    texts = images[image_index] @ rng.normal(size=(4, 3)) + rng.normal(size=(len(image_index), 3))
    fit = cca.fit_cca(MeanFeatures(images, texts, image_index), 0.1, 0.2)
    x, y = images[image_index] - images[image_index].mean(0), texts - texts.mean(0)
    Cx, Cy, Cxy = x.T @ x / len(x), y.T @ y / len(y), x.T @ y / len(x)
    Cx, Cy = Cx + 0.1 * np.trace(Cx) / 4 * np.eye(4), Cy + 0.2 * np.trace(Cy) / 3 * np.eye(3)
    squares = np.sort(np.linalg.eigvals(np.linalg.solve(Cx, Cxy) @ np.linalg.solve(Cy, Cxy.T)).real)[::-1][:3]
    np.testing.assert_allclose(fit.correlations**2, squares, rtol=1e-6)
    np.testing.assert_allclose(fit.A.T @ Cx @ fit.A, np.eye(3), atol=1e-8)
    np.testing.assert_allclose(fit.B.T @ Cy @ fit.B, np.eye(3), atol=1e-8)
    np.testing.assert_allclose(fit.A.T @ Cxy @ fit.B, np.diag(fit.correlations), atol=1e-8)


def test_fit_cca_refuses_equal_features():
    with pytest.raises(DataError, match="all training captions have the same features"):
        cca.fit_cca(MeanFeatures(np.random.default_rng(0).normal(size=(4, 3)), np.ones((4, 2)), np.arange(4)), 0.1, 0.1)
