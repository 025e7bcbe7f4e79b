"""Gradients against central differences of a reference in float64."""

import jax
import numpy as np

STEP = 1e-6


def check_gradient(function, inputs, gradient, seed, tolerance=1e-4) -> None:
    """Compares the `gradient` of a scalar with the difference quotient of `function`, its reference in float64, along a
    random direction of all `inputs` together. The tolerance is relative to the sizes of both, and all must be finite.
    """
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
    rng = np.random.default_rng(seed)
    inputs = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), inputs)
    moved = [function(jax.tree.map(lambda x, d, s=s: x + s * STEP * d, inputs, direction)) for s in (1, -1)]
    expected = (moved[0] - moved[1]) / (2 * STEP)
    terms = jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(np.asarray(g, np.float64) * d), gradient, direction))
    assert abs(sum(terms) - expected) <= tolerance * (1 + abs(expected) + np.sum(np.abs(terms))), (sum(terms), expected)
