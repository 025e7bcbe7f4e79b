"""The exponential moving average of parameters."""

import jax.numpy as jnp
import numpy as np
import pytest

from mefn_jax.training import state


def test_ema_update_equals_loop_with_warmup():
    """The weight of the past is (1 + k) / (10 + k) until it reaches the decay."""
    values = np.random.default_rng(0).normal(size=40)
    expected = ema = 5.0
    for k, value in enumerate(values):
        decay = min(0.7, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * value
        ema = state.ema_update({"x": jnp.float32(ema)}, {"x": jnp.float32(value)}, jnp.int32(k), 0.7)["x"]
    assert float(ema) == pytest.approx(expected, abs=1e-5)
    assert abs(expected - np.sum(values[::-1] * 0.3 * 0.7 ** np.arange(40))) < 1e-2  # the initial 5.0 is forgotten
