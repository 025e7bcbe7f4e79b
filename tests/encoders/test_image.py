"""Encoders: sizes against the published architectures, masks, positions and pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from mefn_jax.data import images
from mefn_jax.encoders.bert import BERT
from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.grids import grid_boxes, pool_grid
from mefn_jax.encoders.gru import GRU
from mefn_jax.encoders.image import ImageEncoder
from mefn_jax.encoders.positions import grid_positions
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.encoders.text import TextEncoder
from mefn_jax.encoders.transformer import stochastic_depth, stochastic_depth_rate
from mefn_jax.encoders.vit import ViT
from mefn_jax.training.state import num_params

SMALL = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 32}
TINY = {
    "resnet": ResNet(8, (1, 1), (8, 16), False, False),
    "bottleneck": ResNet(8, (1, 1), (16, 32), True, True),
    "vit": ViT(**SMALL, patch=8),
    "stem": ViT(**SMALL, patch=8, stem=(4, 8)),
}


def encoder(backbone, region_grids=(7,)):
    return ImageEncoder(backbone, 12, region_grids, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize("name", sorted(TINY))
def test_image_features(name):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    module = encoder(TINY[name], region_grids=(3,))
    params = module.init(jax.random.key(0), pixels)
    found = module.apply(params, pixels)
    assert found.fragments.shape == (2, 9, 12)
    assert found.mask.all()
    np.testing.assert_allclose(np.linalg.norm(found.fragments, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.pooled, axis=-1), 1, rtol=1e-5)
    # An image's features do not depend on what else is in the batch (no batch statistics).
    alone = module.apply(params, pixels[:1])
    np.testing.assert_allclose(alone.fragments, found.fragments[:1], atol=1e-5)


def test_regions_of_several_scales_stand_behind_one_another():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    module = encoder(TINY["vit"], region_grids=(3, 2, 1))
    params = module.init(jax.random.key(0), pixels)
    found = module.apply(params, pixels)
    assert found.fragments.shape == (2, 9 + 4 + 1, 12)
    # The last region is the mean of the whole grid, at the centre, projected by its own scale's layer.
    (grid,), _ = TINY["vit"].apply(
        {"params": params["params"]["backbone"]}, images.normalize_pixels(pixels, (0.5,) * 3, (0.25,) * 3)
    )
    p = params["params"]
    expected = grid.mean((1, 2)) @ p["regions_2"]["kernel"] + p["regions_2"]["bias"]
    expected = expected + grid_positions(1, 1, 64)[0, 0] @ p["positions"]["kernel"]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found.fragments[:, -1], expected, atol=1e-5)
    assert {k: v["kernel"].shape for k, v in p.items() if k.startswith("regions")} == {
        f"regions_{k}": (16, 12) for k in range(3)
    }


def test_a_resnets_scales_are_its_last_stages():
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    module = encoder(ResNet(8, (1, 1, 1), (8, 16, 32), False, False), region_grids=(4, 2))
    shapes = jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
    assert [shapes[f"regions_{k}"]["kernel"].shape[0] for k in range(2)] == [16, 32]
    assert jax.eval_shape(module.apply, {"params": shapes}, pixels).fragments.shape == (1, 16 + 4, 12)


@pytest.mark.parametrize("pooling", ["mean", "gpo"])
def test_pooled_can_be_made_of_the_fragments(pooling):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    module = ImageEncoder(TINY["vit"], 12, (2,), (0.5,) * 3, (0.25,) * 3, pooling)
    found, params = module.init_with_output(jax.random.key(0), pixels)
    assert "pooled" not in params["params"]
    np.testing.assert_allclose(np.linalg.norm(found.pooled, axis=-1), 1, rtol=1e-5)
    ids = np.array([[2, 5, 6, 3, 0]], np.int32)
    text = TextEncoder(GRU(20, 12, word_width=4), 0, pooling)
    found, params = text.init_with_output(jax.random.key(0), ids, ids > 0)
    assert set(params["params"]) == {"backbone"} | ({"pooling"} if pooling == "gpo" else set())
    np.testing.assert_array_equal(found.mask, [[True, True, False]])
    if pooling == "mean":  # of the states, before they get unit length
        states = GRU(20, 12, word_width=4).apply({"params": params["params"]["backbone"]}, ids, ids > 0)[0]
        mean = states[0, 1:3].mean(0)
        np.testing.assert_allclose(found.pooled[0], mean / np.linalg.norm(mean), atol=1e-6)


TOWERS = {
    "vit": ViT(**SMALL | {"layers": 2}, patch=8, pool="tanh", stochastic_depth=0.5),
    "resnet": ResNet(8, (1, 2), (8, 16), True, True, stochastic_depth=0.5),
    "resnet_batch": ResNet(8, (1, 1), (8, 16), True, True, norm="batch"),
    "bert": BERT(**SMALL | {"layers": 2}, vocab_size=20, max_positions=8, pooler=True, dropout=0.1),
    "clip": CLIPText(**SMALL | {"layers": 2}, vocab_size=20, max_positions=8, stochastic_depth=0.5),
}


def inputs_of(name):
    rng = np.random.default_rng(0)
    if name in ("bert", "clip"):
        return rng.integers(1, 20, (3, 8)), np.arange(8) < np.array([[8], [5], [3]])
    return (rng.normal(size=(3, 32, 32, 3)).astype(np.float32),)


def pooled_gradient(module, params, inputs):
    def loss(params):
        states, pooled = module.apply(params, *inputs, deterministic=False, rngs={"dropout": jax.random.key(3)})
        last = states[-1] if isinstance(states, list) else states
        return jnp.mean(last.astype(jnp.float32) ** 2) + jnp.mean(pooled.astype(jnp.float32) ** 2)

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("name", sorted(TOWERS))
def test_remat_changes_no_gradient_and_bfloat16_little(name):
    inputs, module = inputs_of(name), TOWERS[name]
    params = jax.jit(module.init)(jax.random.key(0), *inputs)
    loss, gradient = pooled_gradient(module, params, inputs)
    for remat in ("dots", "blocks"):
        again = pooled_gradient(module.clone(remat=remat), params, inputs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), again, (loss, gradient))
    half = module.clone(dtype="bfloat16")
    assert jax.eval_shape(half.apply, params, *inputs)[1].dtype == jnp.bfloat16
    shapes = jax.eval_shape(half.init, jax.random.key(0), *inputs)
    assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(pooled_gradient(half, params, inputs)[0], loss, rtol=0.05)
    assert set(product_types(jax.make_jaxpr(half.apply)(params, *inputs).jaxpr)) == {jnp.dtype("bfloat16")}


def product_types(jaxpr):
    """What the matrix products and convolutions of a program take, those of inner programs too."""
    for e in jaxpr.eqns:
        if e.primitive.name in ("dot_general", "conv_general_dilated"):
            yield from (v.aval.dtype for v in e.invars)
        for value in e.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                yield from product_types(inner)


class Branch(nn.Module):
    @nn.compact
    def __call__(self, x):
        return stochastic_depth(x, 0.25, deterministic=False)


def test_stochastic_depth_leaves_out_whole_branches():
    assert [stochastic_depth_rate(0.3, k, 4) for k in range(4)] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert stochastic_depth_rate(0.3, 0, 1) == 0
    branch = np.random.default_rng(0).normal(size=(400, 3, 2)).astype(np.float32)
    found = np.asarray(Branch().apply({}, branch, rngs={"dropout": jax.random.key(0)}))
    gone = np.all(found == 0, axis=(1, 2))
    np.testing.assert_allclose(found[~gone], branch[~gone] / 0.75, rtol=1e-6)
    assert 0.17 < gone.mean() < 0.33


def shapes_of(module, *inputs):
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def test_full_sizes_have_the_published_number_of_parameters():
    c = default.get_config()
    pixels = jnp.zeros((1, 224, 224, 3))
    # torchvision's ResNet-101 has 44,549,160, of which the classifier takes 2048 * 1000 + 1000.
    assert num_params(shapes_of(ResNet(**c.image.resnet), pixels)) == 44_549_160 - 2_049_000
    # timm's ViT-S/16 has 22,050,664: less the classifier, the class token and its position.
    assert num_params(shapes_of(ViT(**c.image.vit), pixels)) == 22_050_664 - 385_000 - 2 * 384
    # transformers' bert-base-uncased has 109,482,240, of which the pooler takes 768 * 768 + 768.
    bert = BERT(vocab_size=30522, **c.text.bert)
    ids = jnp.zeros((1, 8), jnp.int32)
    assert num_params(shapes_of(bert, ids, ids > 0)) == 109_482_240 - 590_592


def test_text_features_do_not_see_padding():
    module = TextEncoder(BERT(vocab_size=20, width=16, layers=2, heads=2, mlp_width=32, max_positions=16), 12)
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
    module = TextEncoder(BERT(vocab_size=20, width=16, layers=1, heads=2, mlp_width=32, max_positions=16), 12)
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
