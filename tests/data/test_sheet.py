"""The contact sheet of a training batch."""

import numpy as np
import pytest

from mefn_jax.data import sheet
from mefn_jax.data import tokenizer as tok

CAPTIONS = ["a dog", "a dog left of a cat", "the cat runs", "a dog", "bright day", "so it is"]
TOKENIZER = tok.Tokenizer(tok.train_tokenizer(CAPTIONS, 300, True, "keep"), 4, True, "keep")


def test_draw_batch_frames_positives_and_marks_unknown_words():
    ids, mask = TOKENIZER(["a dog", "☃ cat", "a cat"])
    pixels = np.full((3, 8, 8, 3), 255, np.uint8)
    batch = {
        "images": pixels,
        "text": ids,
        "text_mask": mask,
        "image_index": np.array([4, 7, 4]),
        "caption_index": np.arange(3),
        "view": np.zeros(3, int),
    }
    canvas = np.asarray(sheet.draw_batch(batch, TOKENIZER, columns=3))

    def count_pixels(column, color):
        part = canvas[:, column * sheet._CELL + 5 : (column + 1) * sheet._CELL + 5]
        return (part == np.array(color)).all(-1).sum()

    framed = [count_pixels(k, sheet._FRAMES[0]) > 500 for k in range(3)]
    assert framed == [True, False, True]
    words = canvas[sheet._PICTURE + sheet._GAP + 36 :].astype(int)  # below pictures and titles
    red = (words[..., 0] - words[..., 1] > 80).reshape(len(words), -1)
    per_cell = [red[:, k * sheet._CELL + 5 : (k + 1) * sheet._CELL + 5].sum() for k in range(3)]
    assert [n > 5 for n in per_cell] == [False, True, False]


@pytest.mark.parametrize("shape", [(36, 2048), (1, 5)])
def test_to_picture_draws_regions_as_cells(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    assert sheet.to_picture(x).size == (min(64, shape[1]), shape[0])
