"""Statistics of captions against counts by hand."""

import numpy as np
import pytest

from mefn_jax.data import statistics
from mefn_jax.data import tokenizer as tok
from mefn_jax.data.split import Split

TRAIN = [["a dog", "a dog left of a cat"], ["the cat runs", "a dog"], ["bright day", "so it is"]]
VAL = [["A dog", "a cat ☃ right there"]]
TOKENIZER = tok.Tokenizer(
    tok.train_tokenizer([c for captions in TRAIN for c in captions], 300, True, "keep"), 4, True, "keep"
)


def make_split(name, captions):
    records = [
        {"captions": c, "image_id": str(k), "scene": None, "image": f"{name} {k}".encode()}
        for k, c in enumerate(captions)
    ]
    first = np.cumsum([0, *map(len, captions)])
    return Split(name, records, np.arange(len(captions)), first)


@pytest.fixture(scope="module")
def statistics_of():
    """Statistics by split, of two tiny splits."""
    splits = make_split("train", TRAIN), make_split("val", VAL)
    return {split.name: statistics.compute_statistics(split, TOKENIZER) for split in splits}


def test_compute_statistics_equals_count_by_hand(statistics_of):
    train, val = statistics_of["train"], statistics_of["val"]
    assert train.captions_per_image.tolist() == [2, 2, 2]
    assert train.lengths[[0, 1, 2]].tolist() == [
        2,
        6,
        3,
    ]  # lengths count the wordpieces that are cut off after four, too
    assert train.unknown.sum() == 0
    assert val.unknown.tolist() == [0, 1]
    assert (train.side_fraction, val.side_fraction) == (pytest.approx(1 / 6), 0.5)
    assert statistics.unknown_fraction(val) == pytest.approx(1 / val.lengths.sum())
    lines = statistics.format_duplicates(statistics_of)
    assert lines == [
        "1 captions of train repeat another of train",
        "0 captions of val repeat another of val",
        "1 captions of val (50.00 %) stand in train too",
        "0 images of train repeat another of train",
        "0 images of val repeat another of val",
        "0 images of val (0.00 %) stand in train too",
    ]
    text = "\n".join(statistics.format_statistics(statistics_of, TOKENIZER))
    assert "val: a cat ☃ right there" in text


def draw_regions(seed: bytes):
    """Precomputed regions `(4, 3)`, which stand in the middle of a larger array."""
    return np.random.default_rng(list(seed)).random((4, 9), np.float32)[:, 3:6]


@pytest.mark.parametrize(("key", "make"), [("image", bytes), ("regions", draw_regions)])
def test_format_duplicates_counts_images_by_content(key, make):
    files = {"train": [b"a", b"b", b"a"], "val": [b"c"], "test": [b"b", b"c", b"d", b"e"]}
    statistics_of = {}
    for name, contents in files.items():
        split = make_split(name, [[f"{name} {k}"] for k in range(len(contents))])
        for record, content in zip(split.records, contents, strict=True):
            del record["image"]
            record[key] = make(content)
        statistics_of[name] = statistics.compute_statistics(split, TOKENIZER)
    lines = [line for line in statistics.format_duplicates(statistics_of) if " images of " in line]
    assert lines == [
        "1 images of train repeat another of train",
        "0 images of val repeat another of val",
        "0 images of test repeat another of test",
        "0 images of val (0.00 %) stand in train too",
        "1 images of test (25.00 %) stand in train too",
        "1 images of test (25.00 %) stand in val too",
    ]


def test_summarize_text_counts_and_warns():
    english = make_split("train", [["a dog runs", "a cat"], ["the cat left"]])
    line, warnings = statistics.summarize_text(english, TOKENIZER, True)
    assert line == "0.00 % of wordpieces unknown, 0 of 3 captions cut at 4"
    assert not warnings
    finnish = make_split("train", [["☃ koira juoksee", "a a a a a"], ["lumi"] * 3])
    line, (unknown, cut, flips) = statistics.summarize_text(finnish, TOKENIZER, True)
    assert int(line.split(" captions")[0].split()[-1]) == 5
    assert "of the wordpieces of train are unknown" in unknown
    assert "'☃ koira juoksee'" in unknown
    assert "of the captions of train are cut at text.max_tokens=4 wordpieces" in cut
    assert flips.startswith("note: augment.flip is off")
    assert len(statistics.summarize_text(finnish, TOKENIZER, False)[1]) == 2


def test_summarize_text_takes_evenly_spaced_images(monkeypatch):
    monkeypatch.setattr("mefn_jax.data.split.SAMPLED_IMAGES", 3)
    split = make_split("train", [[f"dog {k}"] for k in range(7)])
    assert split.sampled_captions == ["dog 0", "dog 3", "dog 6"]
    assert "of a sample of 3 cut" in statistics.summarize_text(split, TOKENIZER, False)[0]


def test_format_histogram_counts_every_caption_once():
    lengths = np.random.default_rng(0).integers(0, 77, 1000)
    lines = statistics.format_histogram(lengths)
    assert len(lines) <= 16
    assert sum(int(line.split()[3]) for line in lines) == 1000
    assert max(line.count("#") for line in lines) == 50
