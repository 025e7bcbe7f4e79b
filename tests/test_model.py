"""The boxes of a model's regions."""

import numpy as np

from configs import shapes
from mefn_jax.encoders.grids import grid_boxes
from mefn_jax.model import build_model, region_boxes


def test_region_boxes_are_those_of_region_grids():
    config = shapes.get_config("smoke")
    with config.unlocked():
        config.image.region_grids = (4, 2)
    boxes = region_boxes(config, build_model(config, 50))
    np.testing.assert_array_equal(boxes, np.concatenate([grid_boxes(4, 4), grid_boxes(2, 2)]))
