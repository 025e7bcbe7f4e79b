"""The grain pipeline: the content of a batch, the order of batches, and reading ahead."""

import dataclasses
import io
import itertools
import threading

import jax
import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_data import PREPARE_OPTIONS, make_tokenizer

from configs import default
from mefn_jax.data import images, pipeline
from mefn_jax.data.augment import Augment
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.order import make_rng
from mefn_jax.data.prepare import prepare
from mefn_jax.data.split import Split
from mefn_jax.errors import DataError


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def split_and_tokenizer(prepared):
    dataset = Dataset(prepared)
    return dataset.split("train"), make_tokenizer(dataset)


AUGMENT = Augment(crop=0.5, flip=0.5, color_jitter=0.3, word_noise=0.4)


def read_by_hosts(split_and_tokenizer, hosts, seed, start, threads, workers, steps=2):
    """The batches of `steps` steps from `start` on, each concatenated from the rows that `hosts` hosts read."""
    datasets = [
        pipeline.training_dataset(*split_and_tokenizer, images.Resize(16), 8, seed, rows, augment=AUGMENT)
        for rows in np.split(np.arange(8), hosts)
    ]
    iterators = [pipeline.iterate(d, start, threads, workers, lambda batch: batch) for d in datasets]
    try:
        return [jax.tree.map(lambda *xs: np.concatenate(xs), *map(next, iterators)) for _ in range(steps)]
    finally:
        for iterator in iterators:
            iterator.close()


def check_reading(split_and_tokenizer, hosts, seed, start, threads, workers):
    """Checks that hosts that start at any step read the same batches as one host that looks them up by number."""
    batches = pipeline.training_dataset(*split_and_tokenizer, images.Resize(16), 8, seed, augment=AUGMENT)
    for k, batch in enumerate(read_by_hosts(split_and_tokenizer, hosts, seed, start, threads, workers)):
        assert same(batch, batches[start + k]), k


@settings(deadline=None, max_examples=40)
@given(
    hosts=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 10**6),
    threads=st.integers(1, 4),
)
def test_training_batch_follows_seed_and_step_for_any_hosts_and_threads(
    split_and_tokenizer, hosts, seed, start, threads
):
    check_reading(split_and_tokenizer, hosts, seed, start, threads, 0)


@settings(deadline=None, max_examples=3)
@given(hosts=st.sampled_from([1, 2]), start=st.integers(0, 60), workers=st.integers(1, 3))
def test_training_batch_follows_seed_and_step_for_any_workers(split_and_tokenizer, hosts, start, workers):
    flags.FLAGS.mark_as_parsed()  # grain passes absl's flags to its processes
    check_reading(split_and_tokenizer, hosts, 1, start, 2, workers)


def test_augmentation_follows_seed_epoch_and_caption_alone(split_and_tokenizer):
    """With another batch size, a pair is in another row of another step, but its augmentation is the same."""
    rows = {}
    for size in (8, 20):
        dataset = pipeline.training_dataset(*split_and_tokenizer, images.Resize(16), size, 5, augment=AUGMENT)
        batches = [dataset[k] for k in range(2 * 200 // size)]
        whole = jax.tree.map(lambda *xs: np.concatenate(xs), *batches)
        keys = zip(whole["epoch"].tolist(), whole["caption_index"].tolist(), strict=True)
        rows[size] = {key: (whole["images"][k].tobytes(), whole["text"][k].tobytes()) for k, key in enumerate(keys)}
    assert rows[8] == rows[20]
    assert len(rows[8]) == 400
    differs = [rows[8][0, c] != rows[8][1, c] for c in range(200)]
    assert np.mean(differs) > 0.9  # the next epoch has other augmentations


def test_views_are_rows_of_one_pair_with_other_draws(split_and_tokenizer):
    """Views 0 are the batch without views; all follow from their numbers, on any hosts and workers."""
    options = {"augment": AUGMENT}
    plain = pipeline.training_dataset(*split_and_tokenizer, images.Resize(16), 4, 5, **options)
    dataset = pipeline.training_dataset(*split_and_tokenizer, images.Resize(16), 12, 5, views=3, **options)
    for step in (0, 49, 50):  # the last is in the second epoch
        batch = dataset[step]
        np.testing.assert_array_equal(batch["view"], np.arange(12) % 3)
        assert same({name: x[::3] for name, x in batch.items()}, plain[step])
        for name in ("caption_index", "image_index", "epoch"):
            np.testing.assert_array_equal(batch[name], np.repeat(batch[name][::3], 3))
        differs = [np.any(batch["images"][k] != batch["images"][k + v]) for k in range(0, 12, 3) for v in (1, 2)]
        assert all(differs)
        assert any(np.any(batch["text"][k] != batch["text"][k + 1]) for k in range(0, 12, 3))
        rows = [np.array([0, 4, 5, 11]), np.array([1, 2, 3, 6, 7, 8, 9, 10])]
        for part in rows:
            on_host = pipeline.training_dataset(
                *split_and_tokenizer, images.Resize(16), 12, 5, part, views=3, **options
            )
            assert same(on_host[step], {name: x[part] for name, x in batch.items()})


def test_draws_of_the_first_view_are_those_of_its_key_alone():
    for key in ((3, 7), (2**63 + 5, 1)):
        expected = np.random.Generator(np.random.Philox(key=np.uint64(key))).random(9)
        np.testing.assert_array_equal(make_rng(*key, view=0).random(9), expected)
        assert not np.any(make_rng(*key, view=1).random(9) == expected)


def test_iterate_puts_batches_ahead_of_step(split_and_tokenizer):
    """While a step runs, the next two batches are put on the devices."""
    put_batches, enough = [], threading.Event()

    def put(batch):
        put_batches.append(batch["caption_index"])
        if len(put_batches) == 3:
            enough.set()
        return batch

    iterator = pipeline.iterate(pipeline.training_dataset(*split_and_tokenizer, images.Resize(16), 8, 0), 0, 1, 0, put)
    try:
        next(iterator)
        assert enough.wait(20)
    finally:
        iterator.close()


class BrokenRecords:
    """Records with one image that cannot be decoded."""

    def __init__(self, records):
        self.records = records

    def __getitem__(self, row):
        return self.records[row] | ({"image": b"no image"} if row == 7 else {})


@pytest.mark.parametrize("workers", [0, 1])
def test_iterate_names_broken_image_from_threads_and_processes(split_and_tokenizer, workers):
    flags.FLAGS.mark_as_parsed()
    split = dataclasses.replace(split_and_tokenizer[0], records=BrokenRecords(split_and_tokenizer[0].records))
    dataset = pipeline.training_dataset(split, split_and_tokenizer[1], images.Resize(16), 8, 0)
    iterator = pipeline.iterate(dataset, 0, 2, workers, lambda batch: batch)
    try:
        with pytest.raises(DataError, match=r"image 'train_7\.jpg' cannot be decoded"):
            list(itertools.islice(iterator, 25))
    finally:
        iterator.close()


def test_training_epoch_visits_every_pair_once(split_and_tokenizer):
    split, tokenizer = split_and_tokenizer
    dataset = pipeline.training_dataset(split, tokenizer, images.Resize(16), 8, 3)
    epochs = [np.concatenate([dataset[k]["caption_index"] for k in range(25 * e, 25 * (e + 1))]) for e in range(2)]
    for captions in epochs:
        np.testing.assert_array_equal(np.sort(captions), np.arange(200))
    assert not np.array_equal(*epochs)


def test_training_batch_rows_match_their_indices(split_and_tokenizer):
    split, tokenizer = split_and_tokenizer
    batch = pipeline.training_dataset(split, tokenizer, images.Resize(16), 8, 0)[2]
    for k in range(8):
        record = split.record(int(batch["image_index"][k]))
        text = record["captions"][batch["caption_index"][k] - 5 * batch["image_index"][k]]
        np.testing.assert_array_equal(batch["text"][k], tokenizer([text])[0][0])
        np.testing.assert_array_equal(batch["text_digest"][k], pipeline.digest_captions([text])[0])
        np.testing.assert_array_equal(batch["images"][k], images.decode(record["image"], images.Resize(16), ""))


def test_only_a_pretrained_tower_is_trained_on_the_pixels_of_evaluation(split_and_tokenizer):
    noise, out = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8), io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG")
    records = [{"image": out.getvalue(), "captions": ["a dog"], "image_id": str(k)} for k in range(4)]
    split, config = Split("train", records, np.arange(4), np.arange(5)), default.get_config("smoke").unlock()
    config.image.size, config.train.batch_size = 32, 2
    evaluated = next(pipeline.image_batches(split, images.Resize(32), 2, 1))[0]
    for pretrained in ("", "RESNET"):
        config.image.pretrained = pretrained
        trained = pipeline.training_dataset_from_config(config, split, split_and_tokenizer[1])[0]["images"]
        assert np.array_equal(trained, evaluated) == bool(pretrained)
        assert np.abs(trained.astype(int) - evaluated).mean() < 40


@pytest.mark.parametrize(
    ("caption", "mirrored"), [("a dog runs", True), ("hundur hleypur", False), ("Hund links", False)]
)
def test_images_are_mirrored_where_left_and_right_are_known(caption, mirrored, split_and_tokenizer):
    ramp, out = np.tile(np.arange(0, 240, 6, dtype=np.uint8), (40, 1)), io.BytesIO()
    Image.fromarray(ramp).save(out, "PNG")
    records = [{"image": out.getvalue(), "captions": [caption], "image_id": str(k)} for k in range(4)]
    split, config = Split("train", records, np.arange(4), np.arange(5)), default.get_config("smoke").unlock()
    config.image.size, config.train.batch_size, config.augment.flip = 16, 4, 1.0
    pixels = pipeline.training_dataset_from_config(config, split, split_and_tokenizer[1])[0]["images"]
    assert (pixels[:, 0, 0, 0] > pixels[:, 0, -1, 0]).all() == mirrored


def test_evaluation_batches_keep_order_and_pad_the_last(split_and_tokenizer):
    split, tokenizer = split_and_tokenizer
    batches = list(pipeline.image_batches(split, images.Resize(16), 16, 2))
    assert [n for _, n in batches] == [16, 16, 8]
    assert all(pixels.shape == (16, 16, 16, 3) for pixels, _ in batches)
    pixels = np.concatenate([pixels[:n] for pixels, n in batches])
    for k in (0, 17, 39):
        np.testing.assert_array_equal(pixels[k], images.decode(split.record(k)["image"], images.Resize(16), ""))
    texts = list(pipeline.text_batches(["a b"] * 5, tokenizer, 4))
    assert [n for *_, n in texts] == [4, 1]
    assert not texts[1][1][1:].any()  # padded rows have no words


def test_pair_twins_puts_twins_into_one_batch(tmp_path):
    out = tmp_path / "shapes"
    prepare("shapes", "", out, **PREPARE_OPTIONS | {"scenes": (31, 4, 4)})
    dataset = Dataset(out)
    split, tokenizer = dataset.split("train"), make_tokenizer(dataset)
    twin = split.twins()
    assert (twin >= 0).sum() > 5
    batches = pipeline.training_dataset(split, tokenizer, images.Resize(16), 2, 0, pair_twins=True)
    views = pipeline.training_dataset(split, tokenizer, images.Resize(16), 4, 0, pair_twins=True, views=2)
    epoch = [batches[k] for k in range(78)]  # 155 captions in pairs, so one is visited twice
    np.testing.assert_array_equal(views[7]["caption_index"], np.repeat(batches[7]["caption_index"], 2))
    captions = np.concatenate([b["caption_index"] for b in epoch])
    assert set(captions.tolist()) == set(range(155))
    for batch in epoch:
        first, second = batch["image_index"]
        assert twin[first] == (second if twin[first] >= 0 else -1)
        if twin[first] >= 0:
            assert (batch["caption_index"] % 5 == batch["caption_index"][0] % 5).all()
