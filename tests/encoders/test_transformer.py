"""Stochastic depth."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from mefn_jax.encoders.transformer import stochastic_depth, stochastic_depth_rate


class Branch(nn.Module):
    @nn.compact
    def __call__(self, x):
        return stochastic_depth(x, 0.25, deterministic=False)


def test_stochastic_depth_drops_whole_branches():
    assert [stochastic_depth_rate(0.3, k, 4) for k in range(4)] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert stochastic_depth_rate(0.3, 0, 1) == 0
    branch = np.random.default_rng(0).normal(size=(400, 3, 2)).astype(np.float32)
    output = np.asarray(Branch().apply({}, branch, rngs={"dropout": jax.random.key(0)}))
    dropped = np.all(output == 0, axis=(1, 2))
    np.testing.assert_allclose(output[~dropped], branch[~dropped] / 0.75, rtol=1e-6)
    assert 0.17 < dropped.mean() < 0.33
