"""Grids of regions: average pooling by area, and the boxes of the cells."""

import numpy as np
import pytest

from mefn_jax.encoders.grids import grid_boxes, pool_grid


@pytest.mark.parametrize(("size", "limit"), [(7, 7), (4, 7), (8, 4), (7, 4), (14, 7), (5, 3)])
def test_pool_grid_averages_by_area(size, limit):
    grid = np.random.default_rng(0).normal(size=(1, size, size, 2)).astype(np.float32)
    pooled = np.asarray(pool_grid(grid, limit))
    number = min(size, limit)
    fine = np.repeat(np.repeat(grid, number, 1), number, 2)  # every cell cut into number x number
    expected = fine.reshape(1, number, size, number, size, 2).mean((2, 4))
    np.testing.assert_allclose(pooled, expected, atol=1e-5)


def test_grid_boxes_tile_image_row_by_row():
    boxes = grid_boxes(2, 4)
    np.testing.assert_allclose(boxes[1], [0.25, 0, 0.5, 0.5])
    np.testing.assert_allclose(boxes[4], [0, 0.5, 0.25, 1])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    np.testing.assert_allclose(areas.sum(), 1)
