"""The look at the data: statistics against a count by hand, the contact sheet, and the command."""

import numpy as np
import pytest
from PIL import Image
from test_precomputed import write_precomp

from mefn_jax.data import sheet, statistics
from mefn_jax.data import tokenizer as tok
from mefn_jax.data.split import Split

TRAIN = [["a dog", "a dog left of a cat"], ["the cat runs", "a dog"], ["bright day", "so it is"]]
VAL = [["A dog", "a cat ☃ right there"]]
TOKENIZER = tok.Tokenizer(
    tok.train_tokenizer([c for captions in TRAIN for c in captions], 300, True, "keep"), 4, True, "keep"
)


def split_of(name, captions):
    records = [{"captions": c, "image_id": str(k), "scene": None} for k, c in enumerate(captions)]
    first = np.cumsum([0, *map(len, captions)])
    return Split(name, records, np.arange(len(captions)), first)


@pytest.fixture(scope="module")
def found():
    splits = split_of("train", TRAIN), split_of("val", VAL)
    return {split.name: statistics.compute_statistics(split, TOKENIZER) for split in splits}


def test_statistics_are_those_of_a_count_by_hand(found):
    train, val = found["train"], found["val"]
    assert train.each.tolist() == [2, 2, 2]
    assert train.lengths[[0, 1, 2]].tolist() == [2, 6, 3]  # also of those that are cut off at four
    assert train.unknown.sum() == 0
    assert val.unknown.tolist() == [0, 1]
    assert (train.sides, val.sides) == (pytest.approx(1 / 6), 0.5)
    assert statistics.unknown_fraction(val) == pytest.approx(1 / val.lengths.sum())
    lines = statistics.format_duplicates(found)
    assert lines == [
        "1 captions of train repeat another of train",
        "0 captions of val repeat another of val",
        "1 captions of val (50.00 %) stand in train too",
    ]
    text = "\n".join(statistics.format_statistics(found, TOKENIZER))
    assert "val: a cat ☃ right there" in text


def test_histogram_counts_every_caption_once():
    lengths = np.random.default_rng(0).integers(0, 77, 1000)
    lines = statistics.format_histogram(lengths)
    assert len(lines) <= 16
    assert sum(int(line.split()[3]) for line in lines) == 1000
    assert max(line.count("#") for line in lines) == 50


def test_the_sheet_frames_positives_and_marks_unknown_words():
    ids, mask = TOKENIZER(["a dog", "☃ cat", "a cat"])
    pixels = np.full((3, 8, 8, 3), 255, np.uint8)
    batch = {
        "images": pixels,
        "text": ids,
        "text_mask": mask,
        "image_index": np.array([4, 7, 4]),
        "caption_index": np.arange(3),
    }
    drawn = np.asarray(sheet.draw_batch(batch, TOKENIZER, columns=3))

    def coloured(column, colour):
        part = drawn[:, column * sheet._CELL + 5 : (column + 1) * sheet._CELL + 5]
        return (part == np.array(colour)).all(-1).sum()

    framed = [coloured(k, sheet._FRAMES[0]) > 500 for k in range(3)]
    assert framed == [True, False, True]
    words = drawn[sheet._PICTURE + sheet._GAP + 36 :].astype(int)  # below pictures and titles
    red = (words[..., 0] - words[..., 1] > 80).reshape(len(words), -1)
    per_cell = [red[:, k * sheet._CELL + 5 : (k + 1) * sheet._CELL + 5].sum() for k in range(3)]
    assert [n > 5 for n in per_cell] == [False, True, False]


@pytest.mark.parametrize("shape", [(36, 2048), (1, 5)])
def test_regions_are_drawn_as_cells(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    assert sheet.to_picture(x).size == (min(64, shape[1]), shape[0])


def test_the_command_shows_regions_and_scenes_and_names_what_cannot_be_written(tmp_path, command):
    data = tmp_path / "precomp"
    for split, images in (("train", 8), ("dev", 3), ("testall", 3)):
        write_precomp(data, split, images, shape=(5, 8))
    out = tmp_path / "new" / "sheet.png"
    options = (f"--config.data.dir={data}", "--config.image.arch=regions", "--config.train.batch_size=20")
    text = command("-m mefn_jax.show_data", "--config=configs/flickr8k.py", *options, f"--out={out}").stdout
    for line in ("train               8          40           5", "testall             3          15", "wrote"):
        assert line in text
    assert Image.open(out).size[0] > 1000
    bad = command("-m mefn_jax.show_data", "--config=configs/shapes.py:smoke", f"--out={tmp_path}/x.doc", check=False)
    assert "x.doc: cannot be written as an image" in bad.stderr
    bad = command("-m mefn_jax.show_data", "--config=configs/shapes.py:smoke", "--out=gs://b/x.png", check=False)
    assert "--out=gs://b/x.png" in bad.stderr
