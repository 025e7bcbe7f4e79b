"""Sources, prepare, tokenizer and images; and what each says of malformed input."""

import contextlib
import fcntl
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT, environment, write_flickr8k
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mefn_jax.data import images
from mefn_jax.data import tokenizer as tok
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.formats import tfds_writer
from mefn_jax.data.prepare import prepare
from mefn_jax.data.sources import flickr8k as source
from mefn_jax.errors import DataError

OPTIONS = {"vocab_size": 300, "lower_case": True, "punctuation": "keep", "scenes": None, "seed": 0}


def tokenizer_of(dataset, max_tokens=8):
    return tok.Tokenizer(dataset.tokenizer_json, max_tokens, True, "keep")


def edit(path, change):
    path.write_text(change(path.read_text()))


# --- the Flickr8k format ---


def test_flickr8k_is_read_in_the_order_of_its_lists(flickr8k):
    splits, notes = source.read(flickr8k)
    assert {k: len(v) for k, v in splits.items()} == {"train": 12, "val": 6}
    assert [e["image_id"] for e in splits["train"]] == [f"train_{k}.jpg" for k in range(12)]
    assert all(len(e["captions"]) == 5 for e in splits["val"])
    assert notes == ["Flickr8k.token.txt: skipped 1 captions whose image is in no split list"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("Flickr8k.token.txt", lambda t: "no tab here\n" + t, r"token.txt:1: not '<image>#<number><tab><caption>'"),
        ("Flickr8k.token.txt", lambda t: t + "\nx\n", r"token.txt:92: not"),
        ("Flickr8k.token.txt", lambda t: "train_0.jpg#7\t  \n" + t, r"token.txt:1: empty caption of 'train_0.jpg'"),
        ("Flickr8k.token.txt", lambda t: "train_0.jpg#1\tagain\n" + t, r"caption train_0.jpg#1 stands here a second"),
        ("Flickr8k.token.txt", lambda t: t.replace("dev_2.jpg", "dev_x.jpg"), r"'dev_2.jpg' has no caption"),
        ("Flickr_8k.devImages.txt", lambda t: t + "gone.jpg\n", r"devImages.txt:7: image 'gone.jpg' is not in"),
        ("Flickr_8k.devImages.txt", lambda t: t + "../x.jpg\n", r"devImages.txt:7: '../x.jpg' is not a plain file"),
        ("Flickr_8k.devImages.txt", lambda t: t + "train_0.jpg\n", r"'train_0.jpg' is listed already"),
    ],
)
def test_malformed_flickr8k_is_refused_by_file_and_line(flickr8k, file, change, message):
    edit(flickr8k / file, change)
    with pytest.raises(DataError, match=message):
        source.read(flickr8k)


def test_missing_parts_are_named(flickr8k, tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        source.read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image folder"):
        source.read(tmp_path / "empty")
    (flickr8k / "Flickr8k.token.txt").write_bytes(b"train_0.jpg#0\t\xff\n")
    with pytest.raises(DataError, match="not UTF-8 at byte 14"):
        source.read(flickr8k)
    (flickr8k / "Flickr8k.token.txt").unlink()
    with pytest.raises(DataError, match=r"Flickr8k.token.txt: no such file"):
        source.read(flickr8k)


@settings(deadline=None, max_examples=200)
@given(
    st.text(max_size=60), st.lists(st.sampled_from(["a.jpg#0\tx", "a.jpg#1\ty z", "b#0\t", "\t#", "", "q"]), max_size=5)
)
def test_any_token_file_gives_captions_or_our_own_error(tmp_path_factory, text, lines):
    path = tmp_path_factory.mktemp("fuzz") / "token.txt"
    path.write_text("\n".join([*lines, text]), encoding="utf-8", errors="replace")
    with contextlib.suppress(DataError):  # any other exception fails the test
        captions, _ = source._read_tokens(path, {"a.jpg"})
        assert all(c for of in captions.values() for c in of)


# --- prepare ---


def test_prepared_examples_keep_bytes_and_order(prepared):
    dataset = Dataset(prepared)
    split = dataset.split("train")
    folder = prepared.parent / "source"
    assert (split.num_images, split.num_captions) == (40, 200)
    for k in (0, 7, 39):
        record = split.record(k)
        assert record["image_id"] == f"train_{k}.jpg"
        assert record["image"] == (folder / "Images" / f"train_{k}.jpg").read_bytes()
        assert len(record["captions"]) == 5
        assert record["scene"] is None
    assert dataset.split("dev").name == "val"
    assert (
        tfds.builder_from_directory(str(prepared)).info.file_format == tfds.core.file_adapters.FileFormat.ARRAY_RECORD
    )


def test_prepare_leaves_nothing_behind_when_it_fails(flickr8k, tmp_path, monkeypatch):
    out = tmp_path / "out" / "data"
    (flickr8k / "Images" / "dev_5.jpg").unlink()
    with pytest.raises(DataError, match=r"dev_5.jpg"):
        prepare("flickr8k", flickr8k, out, **OPTIONS)
    write_flickr8k(tmp_path / "again")
    monkeypatch.setattr(tok, "train_tokenizer", lambda *a: 1 / 0)  # late, when the records are written
    with pytest.raises(ZeroDivisionError):
        prepare("flickr8k", tmp_path / "again", out, **OPTIONS)
    assert list(out.parent.iterdir()) == []


KILLED = """
import sys, time
from mefn_jax.data import prepare, tokenizer
def wait(*_):
    print("written", flush=True)
    time.sleep(60)
tokenizer.train_tokenizer = wait
prepare.prepare("flickr8k", sys.argv[1], sys.argv[2], vocab_size=300, lower_case=True, punctuation="keep",
                scenes=None, seed=0)
"""


def test_a_killed_prepare_leaves_nothing_readable_and_starts_over(flickr8k, tmp_path, cache):
    out = tmp_path / "out" / "data"
    words = [sys.executable, "-c", KILLED, flickr8k, out]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(cache))
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.communicate()
    left = list(out.parent.iterdir())
    assert [p.name.startswith(".data.incomplete-") for p in left] == [True]
    at_work = out.parent / ".data.incomplete-other"
    at_work.mkdir()
    lock = (at_work / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="no such directory"):
        Dataset(out)
    prepare("flickr8k", flickr8k, out, **OPTIONS)
    assert set(out.parent.iterdir()) == {out, at_work}  # what another process works on is left alone
    assert Dataset(out).split("train").num_images == 12
    lock.close()


def test_examples_keep_their_order_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_writer, "AT_ONCE", 3)
    monkeypatch.setattr(tfds_writer, "SHARD", 4)
    prepare("flickr8k", write_flickr8k(tmp_path / "source"), tmp_path / "out", **OPTIONS)
    assert len(list((tmp_path / "out").glob("*-train.array_record-*"))) == 3
    split = Dataset(tmp_path / "out").split("train")
    assert [split.record(k)["image_id"] for k in range(12)] == [f"train_{k}.jpg" for k in range(12)]
    assert split.num_captions == 60


def test_prepare_does_not_overwrite(flickr8k, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(DataError, match="not empty; choose another --out"):
        prepare("flickr8k", flickr8k, tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out" / "precious").read_text() == "x"


def cut_shard(root):
    shard = next(root.glob("*-train.array_record-*"))
    shard.write_bytes(shard.read_bytes()[:5000])


def fewer_counts(root):
    edit(root / "metadata.json", lambda t: json.dumps(json.loads(t) | {"caption_counts": {"train": [5], "val": [5]}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "features.json").unlink(), "damaged"),
        (lambda root: (root / "features.json").write_text("{}"), "damaged"),
        (lambda root: (root / "metadata.json").write_text("{"), "damaged"),
        (lambda root: (root / "dataset_info.json").write_text("[" * 100_000), "dataset_info.json: not JSON"),
        (lambda root: (root / "dataset_info.json").write_text('{"name": 3}'), "'name' must be of type str"),
        (lambda root: (root / "dataset_info.json").write_text('{"name": "coco_captions"}'), "damaged"),
        (lambda root: (root / "tokenizer.json").write_bytes(b"\xff"), "tokenizer.json: not UTF-8"),
        (lambda root: next(root.glob("*-train.array_record-*")).unlink(), "damaged"),
        (cut_shard, "damaged"),
        (fewer_counts, "40 examples of train, caption_counts of 1"),
    ],
)
def test_a_damaged_data_set_is_named(prepared, tmp_path, damage, message):
    root = tmp_path / "copy"
    shutil.copytree(prepared, root)
    damage(root)

    def read():
        dataset = Dataset(root)
        return dataset.tokenizer_json, dataset.split("train").all_captions()

    with pytest.raises(DataError, match=message):
        read()


def test_dataset_errors_name_the_option(tmp_path, prepared):
    with pytest.raises(DataError, match=r"data.dir: .*nowhere: no such directory; make one with"):
        Dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a data set"):
        Dataset(tmp_path)
    with pytest.raises(DataError, match=r"no split 'test'; present are train, val"):
        Dataset(prepared).split("test")
    with pytest.raises(DataError, match=r"no split 'trian', did you mean 'train'"):
        Dataset(prepared).split("trian")


# --- images ---


def jpeg(width, height, mode="RGB"):
    ramp = np.linspace(0, 255, width * height * len(mode)).reshape(height, width, len(mode)).astype(np.uint8)
    image = Image.fromarray(ramp.squeeze(), mode if mode != "L" else None)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95)
    return out.getvalue()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (500, 375), (90, 200), (20, 30)])
def test_decode_scales_the_shorter_side_and_crops_the_centre(width, height):
    data = jpeg(width, height)
    found = images.decode(data, images.Resize(32), "x")
    assert found.shape == (32, 32, 3)
    assert found.dtype == np.uint8
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    expected = whole.resize((32, 32), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    difference = np.abs(found.astype(int) - np.asarray(expected, int))
    assert difference.mean() < 3
    assert np.percentile(difference, 99) < 16


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_decode_squashes_or_keeps_a_share_of_the_centre(resample):
    data = jpeg(90, 60)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    method = images.RESAMPLE[resample]
    squashed = images.decode(data, images.Resize(32, "squash", resample=resample), "x")
    np.testing.assert_array_equal(squashed, np.asarray(whole.resize((32, 32), method)))
    cropped = images.decode(data, images.Resize(32, "crop", 0.8, resample), "x").astype(int)
    scaled = whole.resize((60, 40), method)  # 32 / 0.8, as the usual two steps have it
    assert np.abs(cropped - np.asarray(scaled.crop((14, 4, 46, 36)), int)).max() <= 2


def test_grey_images_become_rgb():
    assert images.decode(jpeg(40, 40, "L"), images.Resize(16), "x").shape == (16, 16, 3)


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_unusual_images_are_decoded_right():
    ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (40, 1))
    grey = np.repeat(ramp[..., None], 3, 2).astype(int)

    def error(data):
        return np.abs(images.decode(data, images.Resize(40), "x").astype(int) - grey).max()

    assert error(encoded(Image.fromarray(ramp), "PNG")) == 0
    assert error(encoded(Image.fromarray(ramp.astype(np.uint16) * 257), "PNG")) == 0  # 16 bits
    assert error(encoded(Image.fromarray(ramp).convert("RGB").convert("CMYK"), "JPEG", quality=98)) <= 6
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter clockwise
    lying = Image.fromarray(ramp).transpose(Image.Transpose.ROTATE_90)
    assert error(encoded(lying, "JPEG", quality=98, exif=turned)) <= 6
    assert error(encoded(lying, "JPEG", quality=98)) > 100


def test_an_image_of_absurd_size_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = encoded(Image.new("1", (40, 40)), "PNG")
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(DataError, match="40 x 40 pixels, more than 1,000"),
    ):
        images.decode(data, images.Resize(16), "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="image 'x' cannot be decoded"):
        images.decode(data, images.Resize(16), "x")


@pytest.mark.parametrize("data", [b"", b"not an image", jpeg(100, 100)[:400], jpeg(64, 64)[:-200]])
def test_broken_images_are_named(data):
    with pytest.raises(DataError, match=r"image 'x.jpg' cannot be decoded .* data.skip_undecodable=True"):
        images.decode(data, images.Resize(32), "x.jpg")


def test_normalise():
    pixels = np.array([[[[0, 128, 255]]]], np.uint8)
    found = images.normalize_pixels(pixels, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
    np.testing.assert_allclose(found[0, 0, 0], [-1, (128 / 255 - 0.5) / 0.25, 1], atol=1e-6)


# --- text ---


def test_normalisation():
    assert tok.normalize_caption("  A Dog, runs . ", True, "keep") == "a dog, runs ."
    assert tok.normalize_caption("  A Dog, runs . ", False, "drop") == "A Dog runs"


def test_tokenizer_encodes_unseen_words_by_pieces_and_truncates():
    text = tok.train_tokenizer(["a dog runs", "a cat runs"], 300, True, "keep")
    tokenizer = tok.Tokenizer(text, 4, True, "keep")
    assert tokenizer.pieces("A dog runs") == ["a", "dog", "runs"]
    assert "".join(p.removeprefix("##") for p in tokenizer.pieces("cats")) == "cats"
    ids, mask = tokenizer(["a dog runs", "a a a a a a a a", "a ☃"])
    assert ids.shape == mask.shape == (3, 6)
    vocabulary = json.loads(text)["model"]["vocab"]
    assert ids[0].tolist() == [vocabulary[t] for t in ("[CLS]", "a", "dog", "runs", "[SEP]", "[PAD]")]
    assert ids[1].tolist() == [vocabulary[t] for t in ("[CLS]", "a", "a", "a", "a", "[SEP]")]
    assert mask.sum(1).tolist() == [5, 6, 4]
    assert ids[2, 2] == vocabulary["[UNK]"]


def test_training_the_tokenizer_on_a_closed_vocabulary_gives_the_same_ids_again():
    captions = [
        f"a {c} {s} left of a {d} {s}" for c in ("red", "blue") for d in ("green", "red") for s in ("disc", "star")
    ]
    assert tok.train_tokenizer(captions, 300, True, "keep") == tok.train_tokenizer(captions[::-1], 300, True, "keep")
