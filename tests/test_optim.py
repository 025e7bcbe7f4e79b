"""The optimiser: what decays, the schedule's ends, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mefn_jax import optim
from mefn_jax.encoders.transformer import SelfAttention


def test_matrices_decay_and_nothing_else():
    attention = SelfAttention(heads=2).init(jax.random.key(0), jnp.ones((1, 3, 4)))["params"]
    params = {
        "attention": attention,
        "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
        "log_scale": jnp.float32(2.0),
    }
    params = jax.tree.map(lambda p: p + 1.0, params)
    optimizer = optim.adamw(lambda _: 0.1, weight_decay=0.5, clip_norm=1.0)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)

    def check(path, update, value):
        np.testing.assert_allclose(update, -0.05 * value if path[-1].key == "kernel" else 0 * value, rtol=1e-6)

    jax.tree_util.tree_map_with_path(check, updates, params)


def test_the_schedule_rises_and_falls_to_zero():
    schedule = optim.schedule(0.01, steps=100, warmup=0.1)
    assert [float(schedule(k)) for k in (0, 5, 10, 100)] == pytest.approx([0.0, 0.005, 0.01, 0.0], abs=1e-9)
    assert np.all(np.diff([float(schedule(k)) for k in range(10, 101)]) < 0)


def test_a_long_gradient_is_shortened_first():
    """Adam's first step does not see the gradient's length; its moments do."""
    params = {"kernel": jnp.ones((2, 2))}
    optimizer = optim.adamw(lambda _: 0.1, weight_decay=0.0, clip_norm=2.0)
    _, state = optimizer.update({"kernel": jnp.full((2, 2), 100.0)}, optimizer.init(params), params)
    mean = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2))
    np.testing.assert_allclose(mean, 0.1 * np.full((2, 2), 1.0), rtol=1e-5)  # norm 200 becomes 2: 1 each
