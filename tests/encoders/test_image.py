"""The image encoder: region grids, positions and unit lengths."""

import jax
import numpy as np
import pytest

from mefn_jax.data import images
from mefn_jax.encoders.image import ImageEncoder
from mefn_jax.encoders.positions import grid_positions
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.encoders.vit import ViT

SMALL = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 32}
TINY = {
    "resnet": ResNet(8, (1, 1), (8, 16), False, False),
    "bottleneck": ResNet(8, (1, 1), (16, 32), True, True),
    "vit": ViT(**SMALL, patch=8),
    "stem": ViT(**SMALL, patch=8, stem=(4, 8)),
}


def make_encoder(backbone, region_grids=(7,)):
    return ImageEncoder(backbone, 12, region_grids, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize("name", sorted(TINY))
def test_image_encoder_features_have_unit_length(name):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    module = make_encoder(TINY[name], region_grids=(3,))
    params = module.init(jax.random.key(0), pixels)
    features = module.apply(params, pixels)
    assert features.fragments.shape == (2, 9, 12)
    assert features.mask.all()
    np.testing.assert_allclose(np.linalg.norm(features.fragments, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(features.pooled, axis=-1), 1, rtol=1e-5)
    # An image's features do not depend on the other images of the batch (no batch statistics).
    alone = module.apply(params, pixels[:1])
    np.testing.assert_allclose(alone.fragments, features.fragments[:1], atol=1e-5)


def test_image_encoder_concatenates_region_grids():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    module = make_encoder(TINY["vit"], region_grids=(3, 2, 1))
    params = module.init(jax.random.key(0), pixels)
    features = module.apply(params, pixels)
    assert features.fragments.shape == (2, 9 + 4 + 1, 12)
    # The last region is the mean of the whole grid, at the center, projected by its own grid's layer.
    (grid,), _ = TINY["vit"].apply(
        {"params": params["params"]["backbone"]}, images.normalize_pixels(pixels, (0.5,) * 3, (0.25,) * 3)
    )
    p = params["params"]
    expected = grid.mean((1, 2)) @ p["regions_2"]["kernel"] + p["regions_2"]["bias"]
    expected = expected + grid_positions(1, 1, 64)[0, 0] @ p["positions"]["kernel"]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(features.fragments[:, -1], expected, atol=1e-5)
    assert {k: v["kernel"].shape for k, v in p.items() if k.startswith("regions")} == {
        f"regions_{k}": (16, 12) for k in range(3)
    }


def test_image_encoder_takes_region_grids_from_last_resnet_stages():
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    module = make_encoder(ResNet(8, (1, 1, 1), (8, 16, 32), False, False), region_grids=(4, 2))
    shapes = jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
    assert [shapes[f"regions_{k}"]["kernel"].shape[0] for k in range(2)] == [16, 32]
    assert jax.eval_shape(module.apply, {"params": shapes}, pixels).fragments.shape == (1, 16 + 4, 12)
