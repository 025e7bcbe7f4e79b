"""Position encodings of grids."""

import numpy as np

from mefn_jax.encoders.positions import grid_positions


def test_grid_positions_differ_between_cells_and_agree_between_grids():
    positions = np.asarray(grid_positions(7, 7, 64)).reshape(49, 64)
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    assert distances[~np.eye(49, dtype=bool)].min() > 0.5
    single = np.asarray(grid_positions(1, 1, 64))[0, 0]
    np.testing.assert_allclose(single, positions.reshape(7, 7, 64)[3, 3], atol=1e-6)  # both are the center
