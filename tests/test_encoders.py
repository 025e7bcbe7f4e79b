"""Encoders: sizes against the published architectures, masks, positions and pooling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from mefn_jax.encoders.bert import BERT
from mefn_jax.encoders.image import ImageEncoder, grid_boxes, pool_grid
from mefn_jax.encoders.positions import grid_positions
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.encoders.text import TextEncoder
from mefn_jax.encoders.vit import ViT
from mefn_jax.state import count

TINY = {
    "resnet": ResNet(8, (1, 1), (8, 16), False, False),
    "bottleneck": ResNet(8, (1, 1), (16, 32), True, True),
    "vit": ViT(16, 1, 2, 32, 8),
    "stem": ViT(16, 1, 2, 32, 8, stem=(4, 8)),
}


def encoder(backbone, grid=7):
    return ImageEncoder(backbone, 12, grid, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize("name", sorted(TINY))
def test_image_features(name):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    module = encoder(TINY[name], grid=3)
    params = module.init(jax.random.key(0), pixels)
    found = module.apply(params, pixels)
    assert found.fragments.shape == (2, 9, 12)
    assert found.mask.all()
    np.testing.assert_allclose(np.linalg.norm(found.fragments, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.pooled, axis=-1), 1, rtol=1e-5)
    # An image's features do not depend on what else is in the batch (no batch statistics).
    alone = module.apply(params, pixels[:1])
    np.testing.assert_allclose(alone.fragments, found.fragments[:1], atol=1e-5)


def shapes_of(module, *inputs):
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def test_full_sizes_have_the_published_number_of_parameters():
    c = default.get_config()
    pixels = jnp.zeros((1, 224, 224, 3))
    # torchvision's ResNet-101 has 44,549,160, of which the classifier takes 2048 * 1000 + 1000.
    assert count(shapes_of(ResNet(**c.image.resnet), pixels)) == 44_549_160 - 2_049_000
    # timm's ViT-S/16 has 22,050,664: less the classifier, the class token and its position.
    assert count(shapes_of(ViT(**c.image.vit), pixels)) == 22_050_664 - 385_000 - 2 * 384
    # transformers' bert-base-uncased has 109,482,240, of which the pooler takes 768 * 768 + 768.
    t = c.text
    bert = BERT(30522, t.width, t.layers, t.heads, t.mlp_width, t.max_positions)
    ids = jnp.zeros((1, 8), jnp.int32)
    assert count(shapes_of(bert, ids, ids > 0)) == 109_482_240 - 590_592


def test_text_features_do_not_see_padding():
    module = TextEncoder(BERT(20, 16, 2, 2, 32, 16), 12)
    ids = np.array([[2, 7, 8, 3, 0, 0, 0], [2, 9, 3, 0, 0, 0, 0], [2, 5, 6, 7, 8, 9, 3]], np.int32)
    params = module.init(jax.random.key(0), ids, ids != 0)
    found = module.apply(params, ids, ids != 0)
    np.testing.assert_array_equal(found.mask.sum(1), [2, 1, 5])
    assert np.all(np.asarray(found.fragments)[~np.asarray(found.mask)] == 0)
    short = module.apply(params, ids[:2, :4], ids[:2, :4] != 0)
    np.testing.assert_allclose(short.fragments, found.fragments[:2, :2], atol=1e-5)
    np.testing.assert_allclose(short.pooled, found.pooled[:2], atol=1e-5)
    other = np.where(ids == 0, 11, ids)  # what stands behind the mask has no effect
    np.testing.assert_allclose(module.apply(params, other, ids != 0).pooled, found.pooled, atol=1e-6)


def test_word_order_matters():
    module = TextEncoder(BERT(20, 16, 1, 2, 32, 16), 12)
    ids = np.array([[2, 5, 6, 3], [2, 6, 5, 3]], np.int32)
    found = module.apply(module.init(jax.random.key(0), ids, ids != 0), ids, ids != 0)
    assert np.abs(found.pooled[0] - found.pooled[1]).max() > 1e-3


@pytest.mark.parametrize(("size", "most"), [(7, 7), (4, 7), (8, 4), (7, 4), (14, 7), (5, 3)])
def test_pool_grid_averages_by_area(size, most):
    grid = np.random.default_rng(0).normal(size=(1, size, size, 2)).astype(np.float32)
    pooled = np.asarray(pool_grid(grid, most))
    number = min(size, most)
    fine = np.repeat(np.repeat(grid, number, 1), number, 2)  # every cell cut into number x number
    expected = fine.reshape(1, number, size, number, size, 2).mean((2, 4))
    np.testing.assert_allclose(pooled, expected, atol=1e-5)


def test_positions_tell_cells_apart_and_agree_between_grids():
    positions = np.asarray(grid_positions(7, 7, 64)).reshape(49, 64)
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    assert distances[~np.eye(49, dtype=bool)].min() > 0.5
    coarse = np.asarray(grid_positions(1, 1, 64))[0, 0]
    np.testing.assert_allclose(coarse, positions.reshape(7, 7, 64)[3, 3], atol=1e-6)  # both are the centre


def test_grid_boxes_tile_the_image_row_by_row():
    boxes = grid_boxes(2, 4)
    np.testing.assert_allclose(boxes[1], [0.25, 0, 0.5, 0.5])
    np.testing.assert_allclose(boxes[4], [0, 0.5, 0.25, 1])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    np.testing.assert_allclose(areas.sum(), 1)
