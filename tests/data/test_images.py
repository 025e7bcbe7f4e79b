"""Decoding, resizing and normalizing images, with and without augmentation."""

import dataclasses
import io
import itertools
import struct
import warnings

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_decode_lays_transparent_image_on_white(mode):
    """As transformers' CLIP processor does, also where a palette or one color is transparent."""
    from transformers.image_transforms import convert_to_rgb

    alpha = Image.fromarray(np.tile(np.arange(0, 240, 6, np.uint8), (40, 1)))
    image = Image.open(io.BytesIO(ramp_jpeg(40, 40))).convert("L" if mode == "LA" else "RGB")
    options = {}
    if mode in ("RGBA", "LA"):
        image.putalpha(alpha)
    else:
        image = image.quantize(8) if mode == "P" else image.convert(mode)
        options["transparency"] = image.getpixel((20, 20))
    data = encode_image(image, "PNG", **options)
    expected = convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
    np.testing.assert_array_equal(images.decode(data, images.Resize(40), "x"), expected)
    opaque = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (expected != opaque).any()


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
    resized = images._resize_bilinear(noise, (0, 0, *noise.shape[1::-1]), 224)
    assert np.abs(resized - expected).mean() < 0.8 * np.abs(aliased - expected).mean()
    assert abs(resized.std() / expected.std() - 1) < 0.1


def test_bilinear_resize_ignores_pixels_around_crop():
    framed = np.zeros((320, 320, 3), np.uint8)
    framed[10:-10, 10:-10] = 200
    assert (images._resize_bilinear(framed[10:-10, 10:-10], (0, 0, 300, 300), 224) == 200).all()


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


def detailed_picture(width, height):
    """Noise with lines and columns of one pixel, the hardest picture to resize."""
    pixels = rng(width).integers(0, 256, (height, width, 3), np.uint8)
    pixels[::7], pixels[:, ::5] = 255, 0
    return Image.fromarray(pixels)


def resize_and_crop(image, size, crop, resample):
    """The whole picture resized by Pillow, then cropped, as Hugging Face does it."""
    shorter = round(size / crop)
    width, height = (side * shorter // min(image.size) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), images.RESAMPLE[resample]).crop((left, top, left + size, top + size))


@pytest.mark.parametrize("sides", [(640, 480), (523, 463), (300, 745), (1001, 333), (46, 110)])
@pytest.mark.parametrize("options", [{"subsampling": s} for s in ("4:4:4", "4:2:2", "4:2:0")] + [{"progressive": True}])
def test_decode_equals_pillows_resize_and_crop_of_whole_picture(sides, options):
    data = jpeg(detailed_picture(*sides), **options)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for size, crop, resample in [
        (64, 1.0, "bicubic"),
        (96, 0.875, "bilinear"),
        (40, 0.9, "lanczos"),
        (32, 1, "nearest"),
    ]:
        expected = np.asarray(resize_and_crop(image, size, crop, resample), int)
        for augment in (None, Augment(color_jitter=0.0, flip=0.0)):  # in training without a random crop, too
            decoded = images.decode(data, images.Resize(size, "crop", crop, resample), "x", augment, rng())
            assert np.abs(decoded - expected).max() <= 1
        squashed = images.decode(data, images.Resize(size, "squash", resample=resample), "x")
        assert np.abs(squashed - np.asarray(image.resize((size,) * 2, images.RESAMPLE[resample]), int)).max() <= 1


def test_decode_of_long_strip_resizes_its_center_alone():
    strip = np.zeros((1, 90_000, 3), np.uint8)
    strip[:, 44_990:45_010] = 200
    decoded = images.decode(
        encode_image(Image.fromarray(strip), "PNG"), images.Resize(16), "x"
    )  # 1,440,000 x 16 pixels
    assert (decoded == 200).all()


TURNS_BACK = {k: images.TRANSPOSES.get({6: 8, 8: 6}.get(k, k)) for k in range(1, 9)}


def turned_jpeg(upright, orientation):
    """A JPEG that is to be turned upright by its orientation."""
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    method = TURNS_BACK[orientation]
    image = upright if method is None else upright.transpose(method)
    return jpeg(image, quality=100, subsampling="4:4:4", **({} if orientation == 1 else {"exif": exif}))


def waves(width, height):
    """A picture with two waves of red from left to right and two of green from top to bottom."""
    red, green = (127 + 120 * np.sin(np.linspace(0, 4 * np.pi, side)) for side in (width, height))
    pixels = np.stack(np.broadcast_arrays(red[None], green[:, None], 128.0), -1)
    return Image.fromarray((pixels + rng().random(pixels.shape)).astype(np.uint8))  # dithered


def displacement(pixels, expected):
    """How far a picture of `waves` is from its place, in pixels: the largest of both halves and both directions."""
    shifts = []
    for channel, axis in ((0, 1), (1, 0)):
        found, right = (np.asarray(x, float)[..., channel].mean(1 - axis) for x in (pixels, expected))
        for half in np.array_split(np.arange(2, len(right) - 2), 2):
            slope = np.gradient(right)[half]
            shifts.append(np.sum((found - right)[half] * slope) / np.sum(slope**2))  # least squares
    return np.abs(shifts).max()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("sides", [(523, 463), (403, 617)])
def test_decode_at_reduced_scale_keeps_box_in_place(orientation, sides):
    upright = waves(*sides)
    data = turned_jpeg(upright, orientation)
    resizes = [
        images.Resize(size, "crop", 0.875, resample) for size in (50, 100) for resample in ("bilinear", "bicubic")
    ]
    for resize in [*resizes, images.Resize(50, "squash")]:
        if resize.mode == "squash":
            expected = upright.resize((resize.size,) * 2, Image.Resampling.BILINEAR)
        else:
            expected = resize_and_crop(upright, resize.size, resize.crop, resize.resample)
        assert displacement(images.decode(data, resize, "x", may_reduce=True), expected) < 0.05
    for seed, size in itertools.product(range(3), (30, 60)):
        draws = rng(seed)
        draws.random(4)  # the flip and the color factors are drawn first
        box = augmentation.draw_crop_box(draws, sides, 0.5)
        for resample in ("bilinear", "bicubic"):
            decoded = images.decode(data, images.Resize(size, resample=resample), "x", Augment(crop=0.5), rng(seed))
            expected = upright.crop(box).resize((size, size), images.RESAMPLE[resample])
            assert displacement(decoded, expected) < 0.05


def test_reduced_decode_is_used_where_it_may_be():
    data = jpeg(detailed_picture(640, 480))
    exact, reduced = (images.decode(data, images.Resize(64), "x", may_reduce=m).astype(int) for m in (False, True))
    assert 0.5 < np.abs(exact - reduced).mean() < 30


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


def exif_segment(*entries, order="<"):
    """EXIF with one directory of these entries: (tag, type, count, four bytes)."""
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    directory = b"".join(struct.pack(order + "HHI4s", *entry) for entry in entries)
    return b"Exif\0\0" + header + struct.pack(order + "H", len(entries)) + directory + bytes(4)


def jpeg_with_segment(content, marker=0xE1, data=None):
    """A JPEG with a segment of this content before all others."""
    data = data or jpeg(photograph(48, 32))
    return data[:2] + struct.pack(">BBH", 255, marker, len(content) + 2) + content + data[2:]


TEXT, SHORT, LONG, RATIONAL, UNDEFINED = 2, 3, 4, 5, 7  # types of EXIF values
DAMAGED_METADATA = {
    "text": exif_segment((images.ORIENTATION, TEXT, 2, b"6\0\0\0")),
    "text of no number": exif_segment((images.ORIENTATION, TEXT, 4, b"top\0")),
    "bytes": exif_segment((images.ORIENTATION, UNDEFINED, 4, b"\6\0\0\0")),
    "no value": exif_segment((images.ORIENTATION, SHORT, 0, bytes(4))),
    "value of 9": exif_segment((images.ORIENTATION, SHORT, 1, b"\x09\0\0\0")),
    "rational outside of the file": exif_segment((images.ORIENTATION, RATIONAL, 1, b"\xff\xff\xff\xff")),
    "unknown type": exif_segment((images.ORIENTATION, 99, 1, b"\6\0\0\0")),
    "endless values": exif_segment((images.ORIENTATION, LONG, 2**32 - 1, b"\6\0\0\0")),
    "directory is cut": exif_segment((images.ORIENTATION, SHORT, 1, b"\6\0\0\0"))[:20],
    "directory is elsewhere": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "further directories are elsewhere": exif_segment(*((tag, LONG, 1, b"\xf0" * 4) for tag in (0x8769, 0x8825))),
    "no header": b"Exif\0\0",
    "no byte order": b"Exif\0\0XX*\0" + bytes(20),
    "text instead of XMP": b"http://ns.adobe.com/xap/1.0/\0\xff tiff:Orientation='6'",
}


@pytest.mark.parametrize("kind", DAMAGED_METADATA)
def test_decode_takes_image_with_unreadable_metadata_as_upright(kind):
    data = jpeg(photograph(48, 32))
    expected = images.decode(data, images.Resize(16), "x")
    damaged = jpeg_with_segment(DAMAGED_METADATA[kind], data=data)
    np.testing.assert_array_equal(images.decode(damaged, images.Resize(16), "x"), expected)
    assert images.decode(damaged, images.Resize(16), "x", ALL, rng()).shape == (16, 16, 3)
    if DAMAGED_METADATA[kind].startswith(b"Exif"):
        pixels = Image.open(io.BytesIO(data)).convert("RGB")
        for other in ("PNG", "WEBP"):
            exif = encode_image(
                pixels, other, exif=DAMAGED_METADATA[kind], **({} if other == "PNG" else {"lossless": True})
            )
            np.testing.assert_array_equal(images.decode(exif, images.Resize(16), "x"), expected)


def test_decode_leaves_out_metadata_that_pillow_refuses(monkeypatch):
    """Whatever version of Pillow refuses them: here, one that refuses every EXIF."""
    upright, readers = photograph(48, 32), Image.open
    data = encode_image(upright.convert("CMYK"), "JPEG", quality=98)

    def open_image(file):
        if b"Exif" in file.getvalue():
            raise struct.error("unpack requires a buffer of 4 bytes")
        return readers(file)

    expected = images.decode(data, images.Resize(16), "x")
    monkeypatch.setattr(Image, "open", open_image)
    decoded = images.decode(jpeg_with_segment(b"Exif\0\0II*\0", data=data), images.Resize(16), "x")
    np.testing.assert_array_equal(decoded, expected)


def test_decode_reads_orientation_behind_padded_segment():
    """Segments may be preceded by any number of bytes 255."""
    upright = photograph(48, 32)
    data = turned_jpeg(upright, 6)
    padded = data[:2] + b"\xff\xff" + data[2:]
    np.testing.assert_array_equal(*(images.decode(d, images.Resize(16), "x") for d in (data, padded)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_turns_every_format_upright(orientation):
    upright = photograph(60, 40)
    expected = images.decode(encode_image(upright, "PNG"), images.Resize(16, "squash"), "x").astype(int)
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    method = TURNS_BACK[orientation]
    turned = upright if method is None else upright.transpose(method)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100})):
        data = encode_image(turned, kind, exif=exif, **options)
        decoded = images.decode(data, images.Resize(16, "squash"), "x")
        assert np.abs(decoded - expected).mean() < 4, kind
        assert images._Source(data).sides == (60, 40), kind


QUIET = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
ANY_EXIF = st.one_of(
    st.binary(max_size=80).map(lambda x: b"Exif\0\0" + x),
    st.lists(
        st.tuples(
            st.sampled_from([images.ORIENTATION, 0x011A, 0x8769, 0x8825, 0x927C, 0xA005, 0x02BC, 0x0201]),
            st.integers(0, 20),
            st.integers(0, 12) | st.integers(0, 2**32 - 1),
            st.binary(min_size=4, max_size=4),
        ),
        max_size=6,
    ).map(lambda entries: exif_segment(*entries)),
)


@QUIET
@given(ANY_EXIF, st.sampled_from([0xE1, 0xE2, 0xED]), st.sampled_from(["RGB", "L", "CMYK"]))
def test_decode_never_fails_for_metadata(content, marker, mode):
    data = encode_image(photograph(32, 24).convert(mode), "JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
        decoded = images.decode(jpeg_with_segment(content, marker, data), images.Resize(8, "squash"), "x")
    upright = images.decode(data, images.Resize(8, "squash"), "x")
    turned = [np.asarray(Image.fromarray(upright).transpose(t)) for t in images.TRANSPOSES.values()]
    # Turning before and after resizing differ by rounding.
    assert min(np.abs(decoded.astype(int) - x).max() for x in [upright, *turned]) <= 2


Image.init()
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "MPO", "JPEG2000", "PPM", "TGA", "ICO", "DDS", "PCX")
FORMATS += ("AVIF",) if "AVIF" in Image.SAVE else ()  # older wheels of Pillow lack it
ENCODED = {kind: encode_image(photograph(32, 24), kind) for kind in FORMATS}


@QUIET
@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    st.floats(0, 1) | st.just(1.0),
    st.booleans(),
)
def test_decode_reads_damaged_image_or_raises_data_error(kind, changes, kept, at_start):
    data = bytearray(ENCODED[kind])
    for place, value in changes:
        data[int(place * min(len(data), 100 if at_start else len(data)))] = value
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        try:
            assert images.decode(bytes(data[: int(kept * len(data))]), images.Resize(8), "x").shape == (8, 8, 3)
        except DataError as e:
            message = str(e)
            assert "\n" not in message


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
