"""Decoding, resizing and normalizing images, with and without augmentation."""

import dataclasses
import io

import cv2
import numpy as np
import pytest
from PIL import Image

from mefn_jax.data import augment as augmentation
from mefn_jax.data import images
from mefn_jax.data.augment import Augment
from mefn_jax.errors import DataError


def ramp_jpeg(width, height, mode="RGB"):
    """A JPEG of a brightness ramp."""
    ramp = np.linspace(0, 255, width * height * len(mode)).reshape(height, width, len(mode)).astype(np.uint8)
    image = Image.fromarray(ramp.squeeze(), mode if mode != "L" else None)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95)
    return out.getvalue()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (500, 375), (90, 200), (20, 30)])
def test_decode_resizes_shorter_side_and_crops_center(width, height):
    data = ramp_jpeg(width, height)
    decoded = images.decode(data, images.Resize(32), "x")
    assert decoded.shape == (32, 32, 3)
    assert decoded.dtype == np.uint8
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    image = Image.open(io.BytesIO(data)).convert("RGB")
    expected = image.resize((32, 32), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    difference = np.abs(decoded.astype(int) - np.asarray(expected, int))
    assert difference.mean() < 3
    assert np.percentile(difference, 99) < 16


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_decode_squashes_or_crops_fraction_of_center(resample):
    data = ramp_jpeg(90, 60)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    method = images.RESAMPLE[resample]
    squashed = images.decode(data, images.Resize(32, "squash", resample=resample), "x")
    np.testing.assert_array_equal(squashed, np.asarray(image.resize((32, 32), method)))
    cropped = images.decode(data, images.Resize(32, "crop", 0.8, resample), "x").astype(int)
    scaled = image.resize((60, 40), method)  # the usual two steps: resize to 32 / 0.8, then crop
    assert np.abs(cropped - np.asarray(scaled.crop((14, 4, 46, 36)), int)).max() <= 2


def test_decode_turns_gray_image_into_rgb():
    assert images.decode(ramp_jpeg(40, 40, "L"), images.Resize(16), "x").shape == (16, 16, 3)


def encode_image(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_decode_handles_16_bit_cmyk_and_exif_orientation():
    ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (40, 1))
    gray = np.repeat(ramp[..., None], 3, 2).astype(int)

    def error(data):
        return np.abs(images.decode(data, images.Resize(40), "x").astype(int) - gray).max()

    assert error(encode_image(Image.fromarray(ramp), "PNG")) == 0
    assert error(encode_image(Image.fromarray(ramp.astype(np.uint16) * 257), "PNG")) == 0  # 16 bits
    assert error(encode_image(Image.fromarray(ramp).convert("RGB").convert("CMYK"), "JPEG", quality=98)) <= 6
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate clockwise by 90 degrees
    rotated = Image.fromarray(ramp).transpose(Image.Transpose.ROTATE_90)
    assert error(encode_image(rotated, "JPEG", quality=98, exif=exif)) <= 6
    assert error(encode_image(rotated, "JPEG", quality=98)) > 100


def test_decode_refuses_image_with_too_many_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = encode_image(Image.new("1", (40, 40)), "PNG")
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(DataError, match="40 x 40 pixels, more than 1,000"),
    ):
        images.decode(data, images.Resize(16), "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="image 'x' cannot be decoded"):
        images.decode(data, images.Resize(16), "x")


@pytest.mark.parametrize("data", [b"", b"not an image", ramp_jpeg(100, 100)[:400], ramp_jpeg(64, 64)[:-200]])
def test_decode_names_broken_image(data):
    with pytest.raises(DataError, match=r"image 'x.jpg' cannot be decoded .* data.skip_undecodable=True"):
        images.decode(data, images.Resize(32), "x.jpg")


def test_normalize_pixels_subtracts_mean_and_divides_by_std():
    pixels = np.array([[[[0, 128, 255]]]], np.uint8)
    decoded = images.normalize_pixels(pixels, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
    np.testing.assert_allclose(decoded[0, 0, 0], [-1, (128 / 255 - 0.5) / 0.25, 1], atol=1e-6)


ALL = Augment(crop=0.3, flip=0.5, color_jitter=0.4)


def rng(seed=0):
    return np.random.default_rng(seed)


def photograph(width=500, height=375, seed=0):
    """A smooth image with details of two pixels."""
    small = rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    fine = rng(seed + 1).integers(-30, 30, (height // 2 + 1, width // 2 + 1, 3)).repeat(2, 0).repeat(2, 1)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), int)
    return Image.fromarray((smooth + fine[:height, :width]).clip(0, 255).astype(np.uint8))


def jpeg(image, **options):
    out = io.BytesIO()
    image.save(out, "JPEG", **({"quality": 90, "subsampling": "4:2:0"} | options))
    return out.getvalue()


def test_decode_without_augmentation_equals_evaluation():
    data = jpeg(photograph())
    for resize in (images.Resize(64), images.Resize(224, "squash", resample="bicubic")):
        plain = images.decode(data, resize, "x")
        np.testing.assert_array_equal(images.decode(data, resize, "x", Augment(), rng()), plain)


@pytest.mark.parametrize(("size", "sides"), [(224, (500, 375)), (100, (500, 375)), (48, (640, 480)), (300, (200, 150))])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_decode_random_crop_matches_pillow(size, sides, resample):
    data = jpeg(photograph(*sides))
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for seed in range(5):
        draws = rng(seed)
        draws.random(4)  # the flip and the color factors are drawn first
        box = augmentation.draw_crop_box(draws, sides, 0.3)
        decoded = images.decode(data, images.Resize(size, resample=resample), "x", Augment(crop=0.3), rng(seed))
        expected = image.crop(box).resize((size, size), images.RESAMPLE[resample])
        difference = np.abs(decoded.astype(int) - np.asarray(expected, int))
        if size < 200:  # decoded at a half or quarter of the scale, where libjpeg's filter is a little sharper
            assert difference.mean() < 5
        else:  # only the resizing differs, and the bicubic one is Pillow's own
            assert difference.mean() <= (1.5 if resample == "bilinear" else 0)
        flat = decoded.astype(float).ravel(), np.asarray(expected, float).ravel()
        assert np.corrcoef(*flat)[0, 1] > 0.99


@pytest.mark.parametrize("sides", [(224, 300), (300, 224), (400, 310), (448, 448)])
def test_bilinear_resize_matches_pillow(sides):
    """Resizes noise, of which a method with aliasing keeps too much."""
    noise = rng().integers(0, 256, (*sides, 3), np.uint8)
    expected = np.asarray(Image.fromarray(noise).resize((224, 224), Image.Resampling.BILINEAR), float)
    aliased = cv2.resize(noise, (224, 224), interpolation=cv2.INTER_LINEAR)
    resized = images._resize_bilinear(noise, 224)
    assert np.abs(resized - expected).mean() < 0.8 * np.abs(aliased - expected).mean()
    assert abs(resized.std() / expected.std() - 1) < 0.1


def test_bilinear_resize_ignores_pixels_around_crop():
    framed = np.zeros((320, 320, 3), np.uint8)
    framed[10:-10, 10:-10] = 200
    assert (images._resize_bilinear(framed[10:-10, 10:-10], 224) == 200).all()


def test_decode_flips_unless_forbidden():
    data, resize = jpeg(photograph()), images.Resize(64)
    still = images.decode(data, resize, "x", Augment(crop=0.3, color_jitter=0.4), rng(5))
    always = dataclasses.replace(ALL, flip=1.0)
    np.testing.assert_array_equal(images.decode(data, resize, "x", always, rng(5)), still[:, ::-1])
    np.testing.assert_array_equal(images.decode(data, resize, "x", always, rng(5), may_flip=False), still)


def test_decode_augmentation_follows_seed():
    data, resize = jpeg(photograph()), images.Resize(64)
    first, again, other = (images.decode(data, resize, "x", ALL, rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 3


def decode_by_pillow(data, resize, monkeypatch):
    """The image decoded with a random crop, and without, both by Pillow."""
    with monkeypatch.context() as patch:
        patch.setattr(images, "_read_plain_jpeg_size", lambda data: None)
        return images.decode(data, resize, "x", Augment(crop=0.4), rng(3)), images.decode(data, resize, "x")


@pytest.mark.parametrize("size", [40, 100, 224])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"restart_marker_blocks": 4}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decode_by_opencv_and_pillow_agree(size, options, mode, monkeypatch):
    data, resize = jpeg(photograph().convert(mode), **options), images.Resize(size)
    assert images._read_plain_jpeg_size(data) == (500, 375)
    cropped, image = decode_by_pillow(data, resize, monkeypatch)
    np.testing.assert_allclose(images.decode(data, resize, "x").astype(int), image, atol=2)
    np.testing.assert_allclose(images.decode(data, resize, "x", Augment(crop=0.4), rng(3)).astype(int), cropped, atol=3)


def test_decode_crops_rotated_photograph_upright():
    upright = photograph()
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = jpeg(upright.transpose(Image.Transpose.ROTATE_90), exif=exif, subsampling="4:4:4", quality=98)
    upright_jpeg = jpeg(upright, subsampling="4:4:4", quality=98)
    for size in (64, 224):
        decoded, expected = (
            images.decode(d, images.Resize(size), "x", ALL, rng(4)).astype(int) for d in (rotated, upright_jpeg)
        )
        assert np.abs(decoded - expected).mean() < 2


@pytest.mark.parametrize("kept", [30, 200, 0.5, 0.9])
def test_decode_names_truncated_jpeg(kept):
    data = jpeg(photograph())
    data = data[: kept if kept > 1 else int(kept * len(data))]
    for augment in (None, ALL):
        with pytest.raises(DataError, match=r"image 'x.jpg' cannot be decoded"):
            images.decode(data, images.Resize(64), "x.jpg", augment, rng())


def test_decode_accepts_stray_bytes_before_end_of_jpeg():
    """libjpeg only warns of stray bytes before the end."""
    data = jpeg(photograph())
    stray = data[:-2] + b"\x00\x01\x02" + data[-2:]
    decoded = images.decode(stray, images.Resize(64), "x")
    np.testing.assert_array_equal(decoded, images.decode(data, images.Resize(64), "x"))
