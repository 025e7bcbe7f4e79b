"""The grain pipeline: what a batch follows from, in what order, and how it is read ahead."""

import dataclasses
import itertools
import threading

import jax
import numpy as np
import pytest
from absl import flags
from conftest import write_flickr8k
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import OPTIONS, tokenizer_of

from mefn_jax.data import images, pipeline
from mefn_jax.data.augment import Augment
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.prepare import prepare
from mefn_jax.errors import DataError


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def parts(prepared):
    dataset = Dataset(prepared)
    return dataset.split("train"), tokenizer_of(dataset)


AUGMENT = Augment(crop=0.5, flip=0.5, color_jitter=0.3, word_noise=0.4)


def read_by_hosts(parts, hosts, seed, start, threads, workers, steps=2):
    """The batches of `steps` steps from `start` on, as so many hosts read them, joined."""
    datasets = [
        pipeline.training_dataset(*parts, images.Resize(16), 8, seed, rows, augment=AUGMENT)
        for rows in np.split(np.arange(8), hosts)
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
        keys = zip(whole["epoch"].tolist(), whole["caption_index"].tolist(), strict=True)
        rows[size] = {key: (whole["images"][k].tobytes(), whole["text"][k].tobytes()) for k, key in enumerate(keys)}
    assert rows[8] == rows[20]
    assert len(rows[8]) == 400
    again = [rows[8][0, c] != rows[8][1, c] for c in range(200)]
    assert np.mean(again) > 0.9  # the next pass sees other changes


def test_batches_are_put_ahead_of_the_step(parts):
    """While a step runs, the next two batches are put on the devices."""
    put, enough = [], threading.Event()

    def watch(batch):
        put.append(batch["caption_index"])
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
    epochs = [np.concatenate([dataset[k]["caption_index"] for k in range(25 * e, 25 * (e + 1))]) for e in range(2)]
    for captions in epochs:
        np.testing.assert_array_equal(np.sort(captions), np.arange(200))
    assert not np.array_equal(*epochs)


def test_a_batch_row_is_the_image_and_caption_it_says(parts):
    split, tokenizer = parts
    batch = pipeline.training_dataset(split, tokenizer, images.Resize(16), 8, 0)[2]
    for k in range(8):
        record = split.record(int(batch["image_index"][k]))
        text = record["captions"][batch["caption_index"][k] - 5 * batch["image_index"][k]]
        np.testing.assert_array_equal(batch["text"][k], tokenizer([text])[0][0])
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
    batches = pipeline.training_dataset(split, tokenizer, images.Resize(16), 2, 0, pair_twins=True)
    epoch = [batches[k] for k in range(78)]  # 155 captions in twos; one is visited twice
    captions = np.concatenate([b["caption_index"] for b in epoch])
    assert set(captions.tolist()) == set(range(155))
    for batch in epoch:
        first, second = batch["image_index"]
        assert twin[first] == (second if twin[first] >= 0 else -1)
        if twin[first] >= 0:
            assert (batch["caption_index"] % 5 == batch["caption_index"][0] % 5).all()


def test_bad_images_can_be_left_out(tmp_path):
    root = write_flickr8k(tmp_path / "source", numbers=(6, 4))
    image = root / "Images" / "train_2.jpg"
    image.write_bytes(image.read_bytes()[:500])
    prepare("flickr8k", root, tmp_path / "out", **OPTIONS)
    dataset = Dataset(tmp_path / "out")
    tokenizer = tokenizer_of(dataset)
    with pytest.raises(DataError, match=r"train_2.jpg"):
        [pipeline.training_dataset(dataset.split("train"), tokenizer, images.Resize(16), 6, 0)[k] for k in range(5)]
    split = Dataset(tmp_path / "out", skip_undecodable=True).split("train")
    assert split.skipped == ["train_2.jpg"]
    assert (split.num_images, split.num_captions) == (5, 25)
    batches = [pipeline.training_dataset(split, tokenizer, images.Resize(16), 5, 0)[k] for k in range(5)]
    np.testing.assert_array_equal(np.sort(np.concatenate([b["caption_index"] for b in batches])), np.arange(25))
    assert [split.record(k)["image_id"] for k in range(5)] == [f"train_{k}.jpg" for k in (0, 1, 3, 4, 5)]
