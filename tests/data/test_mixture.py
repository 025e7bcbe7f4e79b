"""Mixtures of data sets with weights: the order of captions, the mixed split, and the commands that read it."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
from commands import SMOKE_FLICKR8K, assert_equal_states, read_state, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_data import PREPARE_OPTIONS, make_tokenizer, write_flickr8k, write_precomputed

from configs import flickr8k as config_file
from mefn_jax.data import images, pipeline, statistics
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.digests import digest_data, find_changes
from mefn_jax.data.from_config import open_dataset
from mefn_jax.data.mixed_dataset import MixedDataset
from mefn_jax.data.mixture import parse_mixture
from mefn_jax.data.order import MIXED_BLOCK, MixedCaptions, ShuffledCaptions
from mefn_jax.data.prepare import prepare
from mefn_jax.errors import ConfigError

MIXTURES = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 100)), min_size=2, max_size=5)


def mixed_captions(mixture, seed) -> MixedCaptions:
    whole = sum(weight for _, weight in mixture)
    return MixedCaptions([size for size, _ in mixture], [Fraction(weight, whole) for _, weight in mixture], seed)


@settings(deadline=None, max_examples=60)
@given(mixture=MIXTURES, seed=st.integers(0, 2**31), start=st.integers(0, 10**9), number=st.integers(1, 300))
def test_mixture_follows_seed_and_position_alone(mixture, seed, start, number):
    """Any positions, in any order and any parts, by any copy, have the captions that they have one by one."""
    positions = start + np.random.default_rng(start).permutation(number)
    captions, epochs = mixed_captions(mixture, seed).locate(positions)
    other = pickle.loads(pickle.dumps(mixed_captions(mixture, seed)))
    other[np.array([0, start + 5 * MIXED_BLOCK])]  # what was read before does not matter
    for k in range(0, number, 37):
        caption, epoch = other.locate(positions[k : k + 1])
        assert (caption[0], epoch[0]) == (captions[k], epochs[k])
    assert np.all((captions >= 0) & (captions < sum(size for size, _ in mixture)))


@settings(deadline=None, max_examples=60)
@given(mixture=MIXTURES, seed=st.integers(0, 2**31), block=st.integers(0, 10**6), stop=st.integers(1, MIXED_BLOCK))
def test_shares_hold_in_every_block_and_on_average(mixture, seed, block, stop):
    order = mixed_captions(mixture, seed)
    whole = sum(weight for _, weight in mixture)
    sources, ranks = order.assign(block * MIXED_BLOCK + np.arange(MIXED_BLOCK))
    for k, (_, weight) in enumerate(mixture):
        share = weight / whole
        assert abs((sources == k).sum() - share * MIXED_BLOCK) < 2
        # How many positions a data set had before is its share of them, and it grows by one at each of its positions.
        mine = ranks[sources == k]
        assert abs(mine[0] - share * block * MIXED_BLOCK) < 2
        np.testing.assert_array_equal(mine, mine[0] + np.arange(len(mine)))
        # A part of a block is a random sample: seven deviations of a hypergeometric distribution.
        deviation = (stop * share * (1 - share)) ** 0.5
        assert abs((sources[:stop] == k).sum() - share * stop) < 7 * deviation + 3


@settings(deadline=None, max_examples=30)
@given(mixture=MIXTURES, seed=st.integers(0, 2**31))
def test_each_data_set_is_visited_in_passes_of_its_own(mixture, seed):
    order, (size, weight) = mixed_captions(mixture, seed), mixture[1]
    length = 2 * size * sum(w for _, w in mixture) // weight + 2 * MIXED_BLOCK
    captions, epochs = order.locate(np.arange(min(length, 60_000)))
    first = mixture[0][0]
    mine = (captions >= first) & (captions < first + size)
    expected = ShuffledCaptions(np.arange(size)[:, None], seed, 2).locate(np.arange(mine.sum()))
    np.testing.assert_array_equal(captions[mine] - first, expected[0])
    np.testing.assert_array_equal(epochs[mine], np.arange(mine.sum()) // size)


def test_orders_of_data_sets_and_seeds_differ():
    orders = [mixed_captions([(50, 1), (50, 1)], seed)[np.arange(2 * MIXED_BLOCK)] for seed in (0, 1)]
    assert not np.array_equal(*orders)
    first, second = orders[0][orders[0] < 50][:50], orders[0][orders[0] >= 50][:50] - 50
    assert not np.array_equal(first, second)
    alone = ShuffledCaptions(np.arange(50)[:, None], 0)[np.arange(50)]
    assert not np.array_equal(first, alone)


@pytest.fixture(scope="module")
def two_data_sets(tmp_path_factory, prepared):
    """Two prepared data sets, of 40 and of 6 training images; the second has an image and a caption of the first."""
    root = tmp_path_factory.mktemp("mixture")
    source = write_flickr8k(root / "source", numbers=(6, 4), seed=1)
    copied = prepared.parent / "source" / "Images" / "dev_3.jpg"
    (source / "Images" / "train_2.jpg").write_bytes(copied.read_bytes())
    prepare("flickr8k", source, root / "small", **PREPARE_OPTIONS)
    return prepared, root / "small"


def mixture_config(two_data_sets, weights=("0.75", "0.25")):
    config = config_file.get_config("smoke").unlock()
    config.data.dir = ",".join(f"{path}:{weight}" for path, weight in zip(two_data_sets, weights, strict=True))
    return config


def test_mixed_split_has_all_images_and_captions(two_data_sets):
    dataset = open_dataset(mixture_config(two_data_sets))
    split, parts = dataset.split("train"), [Dataset(path).split("train") for path in two_data_sets]
    assert (split.num_images, split.num_captions) == (46, 230)
    expected = [part.record(k) for part in parts for k in range(part.num_images)]
    assert [split.record(k) for k in range(46)] == expected
    assert split.all_captions() == [caption for part in parts for caption in part.all_captions()]
    np.testing.assert_array_equal(split.caption_image, np.arange(230) // 5)
    sample = split.first_images(20)
    assert [sample.record(k)["image_id"] for k in (0, 14, 15, 19)] == ["train_0.jpg", "train_14.jpg"] + [
        f"train_{k}.jpg" for k in (0, 4)
    ]
    assert sample.num_captions == 100
    assert dataset.split("val").num_images == 12
    assert dataset.directory == two_data_sets[0]


def test_mixed_batches_have_the_records_of_their_data_sets(two_data_sets):
    dataset = open_dataset(mixture_config(two_data_sets))
    split, tokenizer = dataset.split("train"), make_tokenizer(Dataset(two_data_sets[0]))
    parts = [
        pipeline.training_dataset(split, tokenizer, images.Resize(16), 64, 3, rows)
        for rows in (np.arange(64), np.arange(20), np.arange(20, 64))
    ]
    shares = []
    for step in (0, 7, 1000):
        whole, *pieces = (part[step] for part in parts)
        for key, value in whole.items():
            np.testing.assert_array_equal(value, np.concatenate([piece[key] for piece in pieces]))
        for k in (0, 31, 63):
            image = int(whole["image_index"][k])
            record = split.record(image)
            text = record["captions"][int(whole["caption_index"][k]) - 5 * image]
            np.testing.assert_array_equal(whole["text"][k], tokenizer([text])[0][0])
            np.testing.assert_array_equal(whole["images"][k], images.decode(record["image"], images.Resize(16), ""))
        shares.append(np.mean(whole["image_index"] >= 40))
    assert 0.1 < np.mean(shares) < 0.4
    assert whole["epoch"][whole["image_index"] >= 40].max() > whole["epoch"][whole["image_index"] < 40].max()


def test_statistics_find_images_of_val_in_any_data_set_of_a_mixture(two_data_sets):
    """The small data set has the fourth image of the large one's val in train."""
    dataset, tokenizer = open_dataset(mixture_config(two_data_sets)), make_tokenizer(Dataset(two_data_sets[0]))
    splits = {name: statistics.compute_statistics(dataset.split(name), tokenizer) for name in ("train", "val")}
    lines = statistics.format_duplicates(splits)
    assert "1 images of val (8.33 %) stand in train too" in lines
    splits["train"] = statistics.compute_statistics(Dataset(two_data_sets[0]).split("train"), tokenizer)
    assert "0 images of val (0.00 %) stand in train too" in statistics.format_duplicates(splits)


def test_digest_of_a_mixture_changes_with_any_data_set(two_data_sets):
    first = digest_data(open_dataset(mixture_config(two_data_sets)))
    assert None not in (first["train"], first["val"])
    assert not find_changes(first, digest_data(open_dataset(mixture_config(two_data_sets, ("3", "1")))))
    assert find_changes(first, digest_data(open_dataset(mixture_config(two_data_sets[::-1]))))
    assert find_changes(first, digest_data(Dataset(two_data_sets[0])))


def test_mixture_takes_held_out_images_of_the_first_data_set(two_data_sets):
    config = mixture_config(two_data_sets)
    config.data.held_out_images = 10
    dataset = open_dataset(config)
    assert dataset.split("held_out").num_images == 10
    assert dataset.split("held_out").record(0)["image_id"] == "train_30.jpg"
    assert [dataset.split("train").record(k)["image_id"] for k in (29, 30)] == ["train_29.jpg", "train_0.jpg"]


def test_tokenizer_of_a_mixture_is_that_of_all_or_none(two_data_sets):
    assert open_dataset(mixture_config(two_data_sets)).tokenizer_json is not None  # their words are the same
    split = Dataset(two_data_sets[1])
    mixture = MixedDataset(parse_mixture(f"{two_data_sets[0]}:1,{two_data_sets[1]}:1"))
    assert mixture.tokenizer_json == split.tokenizer_json
    assert mixture.metadata["lower_case"]


def test_regions_are_mixed_if_they_have_one_shape(tmp_path):
    rows = [write_precomputed(tmp_path / name, "train", number) for name, number in (("a", 4), ("b", 3))]
    write_precomputed(tmp_path / "c", "train", 3, shape=(3, 5))
    split = MixedDataset([(str(tmp_path / name), Fraction(1, 2)) for name in "ab"]).split("train")
    order = np.array([5, 0, 6, 3])
    np.testing.assert_array_equal(split.records.read(split.record_ids[order]), np.concatenate(rows)[order])
    with pytest.raises(ConfigError, match=r"a has regions 3 x 4 of float32, but .*c has regions 3 x 5"):
        MixedDataset([(str(tmp_path / name), Fraction(1, 2)) for name in "ac"]).split("train")


def test_parse_mixture_takes_paths_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("data/a", "gs://bucket/x", "a:0.7", "c:/x", "", "a,b", "gs://a,b", "x:y,z"):
        assert parse_mixture(path) == [(path, 1)]
    assert parse_mixture("a:0.7,b:0.3") == [("a", Fraction(7, 10)), ("b", Fraction(3, 10))]
    assert parse_mixture("a:b:2,c d:1, e:1") == [
        ("a:b", Fraction(1, 2)),
        ("c d", Fraction(1, 4)),
        ("e", Fraction(1, 4)),
    ]
    (tmp_path / "a:0.7,b:0.3").mkdir()
    assert parse_mixture("a:0.7,b:0.3") == [("a:0.7,b:0.3", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:0.7,b", "'b' has no weight"),
        ("a:0.7,b:", "'b:' has no weight"),
        ("a:0.7,b:-1", "'b:-1' has no weight"),
        ("a:1,b:0", "a weight is 0"),
        ("a:1,b:0.0001", "a weight is 0 or below 0.0005"),
        ("a:1,./a:1", "a directory occurs twice"),
    ],
)
def test_parse_mixture_names_what_is_wrong(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_mixture(text)


def train_mixture(two_data_sets, command, workdir, steps) -> str:
    words = [*SMOKE_FLICKR8K, f"--config.data.dir={two_data_sets[0]}:3,{two_data_sets[1]}:1"]
    return command("train.py", *words, f"--config.train.steps={steps}", f"--workdir={workdir}").stdout


def test_mixture_is_trained_and_its_first_data_set_evaluated(two_data_sets, tmp_path, command):
    output = train_mixture(two_data_sets, command, tmp_path, 2)
    assert f"75.0 % {two_data_sets[0]} (40 images, 200 captions), 25.0 % {two_data_sets[1]}" in output
    output = command("eval.py", f"--workdir={tmp_path}", "--split=val").stdout
    assert f"note: val is that of {two_data_sets[0]}, the first data set of the mixture" in output


@pytest.mark.slow
def test_training_on_a_mixture_resumes_to_the_bit(two_data_sets, tmp_path, command):
    train_mixture(two_data_sets, command, tmp_path / "whole", 4)
    for steps in (2, 4):
        train_mixture(two_data_sets, command, tmp_path / "parts", steps)
    assert_equal_states(read_state(tmp_path / "whole"), read_state(tmp_path / "parts"))


def test_batches_go_on_at_any_position_with_another_size(two_data_sets):
    """The pairs at a position are the same whatever batches were read before, as after a change of the batch size."""
    dataset = open_dataset(mixture_config(two_data_sets))
    split, tokenizer = dataset.split("train"), make_tokenizer(Dataset(two_data_sets[0]))
    small = pipeline.training_dataset(split, tokenizer, images.Resize(16), 6, 3)
    large = pipeline.training_dataset(split, tokenizer, images.Resize(16), 9, 3, offset=6 * 500 - 9 * 2)
    pairs = [
        np.concatenate([batches[k]["caption_index"] for k in steps])
        for batches, steps in ((small, (500, 501, 502)), (large, (2, 3)))
    ]
    np.testing.assert_array_equal(*pairs)


def test_commands_that_cannot_read_a_mixture_say_so(two_data_sets, tmp_path, command):
    mixture = f"{two_data_sets[0]}:3,{two_data_sets[1]}:1"
    words = [*SMOKE_FLICKR8K, f"--workdir={tmp_path / 'run'}"]
    assert "data.pair_twins does not go with a mixture" in refusal(
        command, "train.py", *words, f"--config.data.dir={mixture}", "--config.data.pair_twins=True"
    )
    assert "data.negatives does not go with a mixture" in refusal(
        command, "train.py", *words, f"--config.data.dir={mixture}", "--config.data.negatives=hard.safetensors"
    )
    assert "must be in a local or mounted directory" in refusal(
        command, "train.py", *words, "--config.data.dir=gs://bucket/a:1,b:2"
    )
    assert "give one data set" in refusal(command, "eval.py", f"--workdir={tmp_path}", f"--data_dir={mixture}")
