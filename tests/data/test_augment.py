"""Augmentation against plain references, the statistics of its draws, and the fast way of decoding JPEGs."""

import dataclasses
import io
import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mefn_jax.data import augment as augmentation
from mefn_jax.data import images
from mefn_jax.data.augment import Augment
from mefn_jax.errors import DataError

sides = st.integers(1, 3000)
shares = st.floats(0.05, 1)
seeds = st.integers(0, 2**32)
ALL = Augment(crop=0.3, flip=0.5, color_jitter=0.4)


def rng(seed=0):
    return np.random.default_rng(seed)


def photograph(width=500, height=375, seed=0):
    """Smooth at large, with detail of two pixels."""
    small = rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    fine = rng(seed + 1).integers(-30, 30, (height // 2 + 1, width // 2 + 1, 3)).repeat(2, 0).repeat(2, 1)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), int)
    return Image.fromarray((smooth + fine[:height, :width]).clip(0, 255).astype(np.uint8))


def jpeg(image, **options):
    out = io.BytesIO()
    image.save(out, "JPEG", **({"quality": 90, "subsampling": "4:2:0"} | options))
    return out.getvalue()


# --- draws ---


@given(sides, sides, shares, seeds)
def test_a_box_lies_in_the_image_and_has_the_share_and_ratio_asked_for(width, height, smallest, seed):
    left, top, right, bottom = augmentation.draw_crop_box(rng(seed), (width, height), smallest)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    assert w <= (h + 0.5) * 4 / 3 + 0.5 or w == 1  # each side is rounded by up to a half
    assert w >= (h - 0.5) * 3 / 4 - 0.5 or h == 1
    if 3 / 4 <= width / height <= 4 / 3:  # no fallback is smaller than this
        assert (w + 0.5) * (h + 0.5) >= smallest * width * height


def test_boxes_have_uniform_shares_ratios_and_places():
    generator = rng()
    boxes = np.array([augmentation.draw_crop_box(generator, (1000, 1000), 0.1) for _ in range(4000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    # Where every box fits (no side of 0.6 area exceeds 1), both are uniform; the largest ones are rejected at times.
    small = w * h < 0.6e6
    share, ratio = (w * h)[small] / 1e6, np.log(w / h)[small]
    assert abs(share.mean() - 0.35) < 0.01
    assert abs(np.quantile(share, 0.25) - 0.225) < 0.015
    assert abs(ratio.mean()) < 0.015
    assert abs(ratio.std() - math.log(4 / 3) / math.sqrt(3)) < 0.01
    place = boxes[small, 0] / (1000 - w[small])
    assert abs(place.mean() - 0.5) < 0.02
    assert abs(place.std() - 1 / math.sqrt(12)) < 0.01


@pytest.mark.parametrize(("shape", "box"), [((1000, 90), (440, 0, 560, 90)), ((90, 1000), (0, 440, 90, 560))])
def test_where_no_box_fits_it_is_the_largest_in_the_centre(shape, box):
    assert augmentation.draw_crop_box(rng(), shape, 0.99) == box


def test_flips_and_colours_are_drawn_as_often_and_as_far_as_asked():
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
def test_draws_take_the_same_numbers_whatever_the_options(seed, crop, flip, colour):
    generator, other = rng(seed), rng(seed)
    for g, c, f, s in ((generator, crop, flip, colour), (other, 1.0, 0.0, 0.0)):
        augmentation.draw_flip(g, f)
        augmentation.draw_color_factors(g, s)
        augmentation.draw_crop_box(g, (400, 300), c)
    assert generator.random() == other.random()


# --- colours ---


@settings(deadline=None)
@given(seeds, st.floats(0.2, 1.8), st.floats(0.2, 1.8), st.floats(0.2, 1.8))
def test_jitter_is_the_three_steps_in_turn_without_clipping_between(seed, brightness, contrast, saturation):
    pixels = rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    grey = [0.299, 0.587, 0.114]
    x = pixels * brightness
    x = contrast * x + (1 - contrast) * (x @ grey).mean()
    x = saturation * x + (1 - saturation) * (x @ grey)[..., None]
    found = augmentation.apply_color_jitter(pixels, np.array([brightness, contrast, saturation]))
    assert found.dtype == np.uint8
    assert np.abs(found - x.clip(0, 255)).max() <= 1  # half for rounding, and OpenCV's factors in fixed point


# --- decode ---


def test_nothing_switched_on_is_what_evaluation_sees():
    data = jpeg(photograph())
    for resize in (images.Resize(64), images.Resize(224, "squash", resample="bicubic")):
        plain = images.decode(data, resize, "x")
        np.testing.assert_array_equal(images.decode(data, resize, "x", Augment(), rng()), plain)


@pytest.mark.parametrize(("size", "sides"), [(224, (500, 375)), (100, (500, 375)), (48, (640, 480)), (300, (200, 150))])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_a_random_crop_is_pillows_decode_crop_and_resize(size, sides, resample):
    data = jpeg(photograph(*sides))
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    for seed in range(5):
        draws = rng(seed)
        draws.random(4)  # flip and colours come first
        box = augmentation.draw_crop_box(draws, sides, 0.3)
        found = images.decode(data, images.Resize(size, resample=resample), "x", Augment(crop=0.3), rng(seed))
        expected = whole.crop(box).resize((size, size), images.RESAMPLE[resample])
        difference = np.abs(found.astype(int) - np.asarray(expected, int))
        if size < 200:  # decoded at a half or quarter of the scale, where libjpeg's filter is a little sharper
            assert difference.mean() < 5
        else:  # nothing but the resizing differs, and for bicubic that is Pillow's own
            assert difference.mean() <= (1.5 if resample == "bilinear" else 0)
        flat = found.astype(float).ravel(), np.asarray(expected, float).ravel()
        assert np.corrcoef(*flat)[0, 1] > 0.99


@pytest.mark.parametrize("sides", [(224, 300), (300, 224), (400, 310), (448, 448)])
def test_bilinear_is_nearly_pillows(sides):
    """On noise, of which a resizing that aliases keeps too much."""
    noise = rng().integers(0, 256, (*sides, 3), np.uint8)
    expected = np.asarray(Image.fromarray(noise).resize((224, 224), Image.Resampling.BILINEAR), float)
    aliased = cv2.resize(noise, (224, 224), interpolation=cv2.INTER_LINEAR)
    error, coarse = (np.abs(found - expected).mean() for found in (images._bilinear(noise, 224), aliased))
    assert error < 0.8 * coarse
    assert abs(images._bilinear(noise, 224).std() / expected.std() - 1) < 0.1


def test_a_cut_sees_nothing_of_what_is_around_it():
    framed = np.zeros((320, 320, 3), np.uint8)
    framed[10:-10, 10:-10] = 200
    assert (images._bilinear(framed[10:-10, 10:-10], 224) == 200).all()


def test_a_flip_mirrors_and_can_be_forbidden():
    data, resize = jpeg(photograph()), images.Resize(64)
    still = images.decode(data, resize, "x", Augment(crop=0.3, color_jitter=0.4), rng(5))
    always = dataclasses.replace(ALL, flip=1.0)
    np.testing.assert_array_equal(images.decode(data, resize, "x", always, rng(5)), still[:, ::-1])
    np.testing.assert_array_equal(images.decode(data, resize, "x", always, rng(5), may_flip=False), still)


def test_the_seed_decides():
    data, resize = jpeg(photograph()), images.Resize(64)
    first, again, other = (images.decode(data, resize, "x", ALL, rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 3


def through_pillow(data, resize, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(images, "_plain_jpeg_size", lambda data: None)
        return images.decode(data, resize, "x", Augment(crop=0.4), rng(3)), images.decode(data, resize, "x")


@pytest.mark.parametrize("size", [40, 100, 224])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"restart_marker_blocks": 4}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_both_ways_of_decoding_agree(size, options, mode, monkeypatch):
    data, resize = jpeg(photograph().convert(mode), **options), images.Resize(size)
    assert images._plain_jpeg_size(data) == (500, 375)
    cropped, whole = through_pillow(data, resize, monkeypatch)
    np.testing.assert_allclose(images.decode(data, resize, "x").astype(int), whole, atol=2)
    np.testing.assert_allclose(images.decode(data, resize, "x", Augment(crop=0.4), rng(3)).astype(int), cropped, atol=3)


def test_a_turned_photograph_is_cropped_upright():
    upright = photograph()
    turned = Image.Exif()
    turned[0x0112] = 6
    lying = jpeg(upright.transpose(Image.Transpose.ROTATE_90), exif=turned, subsampling="4:4:4", quality=98)
    straight = jpeg(upright, subsampling="4:4:4", quality=98)
    for size in (64, 224):
        found, expected = (
            images.decode(d, images.Resize(size), "x", ALL, rng(4)).astype(int) for d in (lying, straight)
        )
        assert np.abs(found - expected).mean() < 2


@pytest.mark.parametrize("kept", [30, 200, 0.5, 0.9])
def test_a_truncated_jpeg_is_named(kept):
    data = jpeg(photograph())
    data = data[: kept if kept > 1 else int(kept * len(data))]
    for augment in (None, ALL):
        with pytest.raises(DataError, match=r"image 'x.jpg' cannot be decoded"):
            images.decode(data, images.Resize(64), "x.jpg", augment, rng())


def test_what_pillow_forgives_is_forgiven():
    """Stray bytes before the end, which libjpeg only warns of."""
    data = jpeg(photograph())
    stray = data[:-2] + b"\x00\x01\x02" + data[-2:]
    found = images.decode(stray, images.Resize(64), "x")
    np.testing.assert_array_equal(found, images.decode(data, images.Resize(64), "x"))
