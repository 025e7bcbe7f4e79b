"""Position encodings of grids, and buckets of distances in texts."""

import math

import numpy as np

from mefn_jax.encoders.bert import count_distance_buckets
from mefn_jax.encoders.positions import grid_positions, grid_rotation, resize_positions


def test_grid_positions_differ_between_cells_and_agree_between_grids():
    positions = np.asarray(grid_positions(7, 7, 64)).reshape(49, 64)
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    assert distances[~np.eye(49, dtype=bool)].min() > 0.5
    single = np.asarray(grid_positions(1, 1, 64))[0, 0]
    np.testing.assert_allclose(single, positions.reshape(7, 7, 64)[3, 3], atol=1e-6)  # both are the center


def test_distance_buckets_grow_with_the_logarithm():
    """Written out for each pair of tokens: single distances below 8, then logarithmic up to 128, on both sides."""
    buckets = count_distance_buckets(200, 32)
    for i in range(0, 200, 7):
        for j in range(200):
            distance = abs(i - j)
            far = 8 + math.floor(math.log(distance / 8) / math.log(128 / 8) * 8 + 1e-6) if distance else 0
            expected = distance if distance < 8 else min(far, 15)
            assert buckets[i, j] == expected + 16 * (j > i)


def test_grid_rotation_turns_by_place():
    """A channel pair turns by the patch's row or column times a frequency; tokens without a place do not turn."""
    cosines, sines = (np.asarray(x) for x in grid_rotation(2, 3, 8, 100.0, before=1))
    assert cosines.shape == (7, 8)
    np.testing.assert_array_equal(cosines[0], 1)
    np.testing.assert_array_equal(sines[0], 0)
    for row in range(2):
        for column in range(3):
            y, x = 2 * (row + 0.5) / 2 - 1, 2 * (column + 0.5) / 3 - 1
            angles = [2 * np.pi * place / 100.0 ** (k / 2) for place in (y, x) for k in range(2)]
            np.testing.assert_allclose(cosines[1 + 3 * row + column], np.cos(angles * 2), atol=1e-6)
            np.testing.assert_allclose(sines[1 + 3 * row + column], np.sin(angles * 2), atol=1e-6)


def test_smooth_resizing_averages():
    """Halving a table with smoothing leaves a constant one as it is and damps one that alternates."""
    table = np.stack([np.ones(16), np.tile([1.0, -1.0], 8)], -1).astype(np.float32)
    smooth, plain = (np.asarray(resize_positions(table, (1, 16), (1, 8), antialias)) for antialias in (True, False))
    np.testing.assert_allclose(smooth[:, 0], 1, atol=1e-6)
    np.testing.assert_allclose(plain[:, 0], 1, atol=1e-6)
    assert np.abs(smooth[2:-2, 1]).max() < 0.05
