"""Sources, prepare, tokenizer, images and the pipeline; and what each says of malformed input."""

import contextlib
import dataclasses
import fcntl
import io
import itertools
import json
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from conftest import ROOT, environment, write_flickr8k
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mefn_jax.data import flickr8k as source
from mefn_jax.data import images, pipeline, writing
from mefn_jax.data import tokenizer as tok
from mefn_jax.data.augment import Augment
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.prepare import prepare
from mefn_jax.errors import DataError

OPTIONS = {"vocab_size": 300, "lower_case": True, "punctuation": "keep", "scenes": None, "seed": 0}


def tokenizer_of(dataset, max_words=8):
    return tok.Tokenizer(dataset.tokenizer_json, max_words, True, "keep")


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
    assert (split.images, split.captions) == (40, 200)
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
    monkeypatch.setattr(tok, "train", lambda *a: 1 / 0)  # late, when the records are written
    with pytest.raises(ZeroDivisionError):
        prepare("flickr8k", tmp_path / "again", out, **OPTIONS)
    assert list(out.parent.iterdir()) == []


KILLED = """
import sys, time
from mefn_jax.data import prepare, tokenizer
def wait(*_):
    print("written", flush=True)
    time.sleep(60)
tokenizer.train = wait
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
    assert Dataset(out).split("train").images == 12
    lock.close()


def test_examples_keep_their_order_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "AT_ONCE", 3)
    monkeypatch.setattr(writing, "SHARD", 4)
    prepare("flickr8k", write_flickr8k(tmp_path / "source"), tmp_path / "out", **OPTIONS)
    assert len(list((tmp_path / "out").glob("*-train.array_record-*"))) == 3
    split = Dataset(tmp_path / "out").split("train")
    assert [split.record(k)["image_id"] for k in range(12)] == [f"train_{k}.jpg" for k in range(12)]
    assert split.captions == 60


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
        return dataset.tokenizer_json, dataset.split("train").texts()

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
    with pytest.raises(DataError, match=r"image 'x.jpg' cannot be decoded .* data.skip_bad=True"):
        images.decode(data, images.Resize(32), "x.jpg")


def test_normalise():
    pixels = np.array([[[[0, 128, 255]]]], np.uint8)
    found = images.normalise(pixels, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
    np.testing.assert_allclose(found[0, 0, 0], [-1, (128 / 255 - 0.5) / 0.25, 1], atol=1e-6)


# --- text ---


def test_normalisation():
    assert tok.normalise("  A Dog, runs . ", True, "keep") == "a dog, runs ."
    assert tok.normalise("  A Dog, runs . ", False, "drop") == "A Dog runs"


def test_tokenizer_encodes_unseen_words_by_pieces_and_truncates():
    text = tok.train(["a dog runs", "a cat runs"], 300, True, "keep")
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
    assert tok.train(captions, 300, True, "keep") == tok.train(captions[::-1], 300, True, "keep")


# --- the pipeline ---


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def parts(prepared):
    dataset = Dataset(prepared)
    return dataset.split("train"), tokenizer_of(dataset)


AUGMENT = Augment(crop=0.5, flip=0.5, colour=0.3, words=0.4)


def read_by_hosts(parts, hosts, seed, start, threads, workers, steps=2):
    """The batches of `steps` steps from `start` on, as so many hosts read them, joined."""
    datasets = [
        pipeline.training_dataset(*parts, images.Resize(16), 8, seed, (p, hosts), augment=AUGMENT) for p in range(hosts)
    ]
    iterators = [pipeline.iterate(d, start, threads, workers, lambda batch: batch) for d in datasets]
    try:
        return [jax.tree.map(lambda *xs: np.concatenate(xs), *map(next, iterators)) for _ in range(steps)]
    finally:
        for iterator in iterators:
            iterator.close()


def check_reading(parts, hosts, seed, start, threads, workers):
    """What hosts read from any step on is what one host has at these steps, by their numbers alone."""
    whole = pipeline.training_dataset(*parts, images.Resize(16), 8, seed, augment=AUGMENT)
    for k, batch in enumerate(read_by_hosts(parts, hosts, seed, start, threads, workers)):
        assert same(batch, whole[start + k]), k


@settings(deadline=None, max_examples=40)
@given(
    hosts=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 10**6),
    threads=st.integers(1, 4),
)
def test_a_batch_follows_from_seed_and_step_on_any_hosts_and_threads(parts, hosts, seed, start, threads):
    check_reading(parts, hosts, seed, start, threads, 0)


@settings(deadline=None, max_examples=3)
@given(hosts=st.sampled_from([1, 2]), start=st.integers(0, 60), workers=st.integers(1, 3))
def test_a_batch_follows_from_seed_and_step_with_any_workers(parts, hosts, start, workers):
    flags.FLAGS.mark_as_parsed()  # grain's processes take absl's flags along
    check_reading(parts, hosts, 1, start, 2, workers)


def test_what_is_random_follows_from_seed_epoch_and_caption_alone(parts):
    """Another batch size puts a pair into another row of another step, and changes nothing of it."""
    rows = {}
    for size in (8, 20):
        dataset = pipeline.training_dataset(*parts, images.Resize(16), size, 5, augment=AUGMENT)
        batches = [dataset[k] for k in range(2 * 200 // size)]
        whole = jax.tree.map(lambda *xs: np.concatenate(xs), *batches)
        keys = zip(whole["epoch"].tolist(), whole["caption"].tolist(), strict=True)
        rows[size] = {key: (whole["images"][k].tobytes(), whole["ids"][k].tobytes()) for k, key in enumerate(keys)}
    assert rows[8] == rows[20]
    assert len(rows[8]) == 400
    again = [rows[8][0, c] != rows[8][1, c] for c in range(200)]
    assert np.mean(again) > 0.9  # the next pass sees other changes


def test_batches_are_put_ahead_of_the_step(parts):
    """While a step runs, the next two batches are put on the devices."""
    put, enough = [], threading.Event()

    def watch(batch):
        put.append(batch["caption"])
        if len(put) == 3:
            enough.set()
        return batch

    iterator = pipeline.iterate(pipeline.training_dataset(*parts, images.Resize(16), 8, 0), 0, 1, 0, watch)
    try:
        next(iterator)
        assert enough.wait(20)
    finally:
        iterator.close()


class Broken:
    """Records of which one image cannot be decoded."""

    def __init__(self, records):
        self.records = records

    def __getitem__(self, row):
        return self.records[row] | ({"image": b"no image"} if row == 7 else {})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_from_any_thread_and_process(parts, workers):
    flags.FLAGS.mark_as_parsed()
    split = dataclasses.replace(parts[0], records=Broken(parts[0].records))
    dataset = pipeline.training_dataset(split, parts[1], images.Resize(16), 8, 0)
    iterator = pipeline.iterate(dataset, 0, 2, workers, lambda batch: batch)
    try:
        with pytest.raises(DataError, match=r"image 'train_7\.jpg' cannot be decoded"):
            list(itertools.islice(iterator, 25))
    finally:
        iterator.close()


def test_one_epoch_visits_every_pair_once(parts):
    split, tokenizer = parts
    dataset = pipeline.training_dataset(split, tokenizer, images.Resize(16), 8, 3)
    epochs = [np.concatenate([dataset[k]["caption"] for k in range(25 * e, 25 * (e + 1))]) for e in range(2)]
    for captions in epochs:
        np.testing.assert_array_equal(np.sort(captions), np.arange(200))
    assert not np.array_equal(*epochs)


def test_a_batch_row_is_the_image_and_caption_it_says(parts):
    split, tokenizer = parts
    batch = pipeline.training_dataset(split, tokenizer, images.Resize(16), 8, 0)[2]
    for k in range(8):
        record = split.record(int(batch["owner"][k]))
        text = record["captions"][batch["caption"][k] - 5 * batch["owner"][k]]
        np.testing.assert_array_equal(batch["ids"][k], tokenizer([text])[0][0])
        np.testing.assert_array_equal(batch["images"][k], images.decode(record["image"], images.Resize(16), ""))


def test_evaluation_order_is_source_order_and_padded(parts):
    split, tokenizer = parts
    batches = list(pipeline.image_batches(split, images.Resize(16), 16, 2))
    assert [n for _, n in batches] == [16, 16, 8]
    assert all(pixels.shape == (16, 16, 16, 3) for pixels, _ in batches)
    pixels = np.concatenate([pixels[:n] for pixels, n in batches])
    for k in (0, 17, 39):
        np.testing.assert_array_equal(pixels[k], images.decode(split.record(k)["image"], images.Resize(16), ""))
    texts = list(pipeline.text_batches(["a b"] * 5, tokenizer, 4))
    assert [n for *_, n in texts] == [4, 1]
    assert not texts[1][1][1:].any()  # padded rows have no words


def test_twins_come_in_one_batch_and_every_pair_is_visited(tmp_path):
    out = tmp_path / "shapes"
    prepare("shapes", "", out, **OPTIONS | {"scenes": (31, 4, 4)})
    dataset = Dataset(out)
    split, tokenizer = dataset.split("train"), tokenizer_of(dataset)
    twin = split.twins()
    assert (twin >= 0).sum() > 5
    batches = pipeline.training_dataset(split, tokenizer, images.Resize(16), 2, 0, twins_together=True)
    epoch = [batches[k] for k in range(78)]  # 155 captions in twos; one is visited twice
    captions = np.concatenate([b["caption"] for b in epoch])
    assert set(captions.tolist()) == set(range(155))
    for batch in epoch:
        first, second = batch["owner"]
        assert twin[first] == (second if twin[first] >= 0 else -1)
        if twin[first] >= 0:
            assert (batch["caption"] % 5 == batch["caption"][0] % 5).all()


def test_bad_images_can_be_left_out(tmp_path):
    root = write_flickr8k(tmp_path / "source", numbers=(6, 4))
    image = root / "Images" / "train_2.jpg"
    image.write_bytes(image.read_bytes()[:500])
    prepare("flickr8k", root, tmp_path / "out", **OPTIONS)
    dataset = Dataset(tmp_path / "out")
    tokenizer = tokenizer_of(dataset)
    with pytest.raises(DataError, match=r"train_2.jpg"):
        [pipeline.training_dataset(dataset.split("train"), tokenizer, images.Resize(16), 6, 0)[k] for k in range(5)]
    split = Dataset(tmp_path / "out", skip_bad=True).split("train")
    assert split.skipped == ["train_2.jpg"]
    assert (split.images, split.captions) == (5, 25)
    batches = [pipeline.training_dataset(split, tokenizer, images.Resize(16), 5, 0)[k] for k in range(5)]
    np.testing.assert_array_equal(np.sort(np.concatenate([b["caption"] for b in batches])), np.arange(25))
    assert [split.record(k)["image_id"] for k in range(5)] == [f"train_{k}.jpg" for k in (0, 1, 3, 4, 5)]
