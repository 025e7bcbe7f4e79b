"""Random augmentation: statistics of the draws, and the color jitter against its formula."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.data import augment as augmentation

sides = st.integers(1, 3000)
area_fractions = st.floats(0.05, 1)
seeds = st.integers(0, 2**32)


def rng(seed=0):
    return np.random.default_rng(seed)


@given(sides, sides, area_fractions, seeds)
def test_draw_crop_box_lies_in_image_with_area_and_ratio(width, height, smallest, seed):
    left, top, right, bottom = augmentation.draw_crop_box(rng(seed), (width, height), smallest)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    assert w <= (h + 0.5) * 4 / 3 + 0.5 or w == 1  # each side is rounded by up to a half
    assert w >= (h - 0.5) * 3 / 4 - 0.5 or h == 1
    if 3 / 4 <= width / height <= 4 / 3:  # a fallback box is never smaller
        assert (w + 0.5) * (h + 0.5) >= smallest * width * height


def test_draw_crop_box_is_uniform_in_area_ratio_and_place():
    generator = rng()
    boxes = np.array([augmentation.draw_crop_box(generator, (1000, 1000), 0.1) for _ in range(4000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    # Below 0.6 of the image's area every box fits, so area and ratio are uniform; some larger boxes are rejected.
    small = w * h < 0.6e6
    area, ratio = (w * h)[small] / 1e6, np.log(w / h)[small]
    assert abs(area.mean() - 0.35) < 0.01
    assert abs(np.quantile(area, 0.25) - 0.225) < 0.015
    assert abs(ratio.mean()) < 0.015
    assert abs(ratio.std() - math.log(4 / 3) / math.sqrt(3)) < 0.01
    place = boxes[small, 0] / (1000 - w[small])
    assert abs(place.mean() - 0.5) < 0.02
    assert abs(place.std() - 1 / math.sqrt(12)) < 0.01


@pytest.mark.parametrize(("shape", "box"), [((1000, 90), (440, 0, 560, 90)), ((90, 1000), (0, 440, 90, 560))])
def test_draw_crop_box_falls_back_to_largest_center_box(shape, box):
    assert augmentation.draw_crop_box(rng(), shape, 0.99) == box


def test_draw_flip_and_color_factors_have_their_rates():
    generator = rng()
    assert abs(np.mean([augmentation.draw_flip(generator, 0.3) for _ in range(4000)]) - 0.3) < 0.03
    assert not any(augmentation.draw_flip(generator, 0.0) for _ in range(100))
    factors = np.array([augmentation.draw_color_factors(generator, 0.4) for _ in range(4000)])
    assert factors.shape == (4000, 3)
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    np.testing.assert_allclose(factors.mean(0), 1, atol=0.015)
    np.testing.assert_allclose(factors.std(0), 0.4 / math.sqrt(3), atol=0.01)


@given(seeds, st.floats(0.1, 1), st.floats(0, 1), st.floats(0, 1))
def test_augmentation_draws_equally_many_random_numbers_for_any_options(seed, crop, flip, color):
    generator, other = rng(seed), rng(seed)
    for g, c, f, s in ((generator, crop, flip, color), (other, 1.0, 0.0, 0.0)):
        augmentation.draw_flip(g, f)
        augmentation.draw_color_factors(g, s)
        augmentation.draw_crop_box(g, (400, 300), c)
    assert generator.random() == other.random()


@settings(deadline=None)
@given(seeds, st.floats(0.2, 1.8), st.floats(0.2, 1.8), st.floats(0.2, 1.8))
def test_apply_color_jitter_equals_three_steps_without_clipping(seed, brightness, contrast, saturation):
    pixels = rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    gray = [0.299, 0.587, 0.114]
    x = pixels * brightness
    x = contrast * x + (1 - contrast) * (x @ gray).mean()
    x = saturation * x + (1 - saturation) * (x @ gray)[..., None]
    jittered = augmentation.apply_color_jitter(pixels, np.array([brightness, contrast, saturation]))
    assert jittered.dtype == np.uint8
    assert np.abs(jittered - x.clip(0, 255)).max() <= 1  # 0.5 for rounding, and OpenCV's fixed-point factors
