"""Pointing accuracy: which wordpieces name what, and a matcher that points right, wrong or anywhere."""

import types

import numpy as np
import pytest

from configs import shapes
from mefn_jax.data import tokenizer as tokens
from mefn_jax.data.scenes import draw as drawn
from mefn_jax.data.scenes import grammar
from mefn_jax.data.split import Split
from mefn_jax.encoders.grids import grid_boxes
from mefn_jax.evaluation import pointing
from mefn_jax.features import Features
from mefn_jax.model import build_model, region_boxes


@pytest.fixture(scope="module")
def scenes():
    records = list(drawn.generate_examples("test", 30, 0))
    split = Split("test", records, np.arange(30), np.arange(31) * 5)
    json = tokens.train_tokenizer(split.all_captions(), 400, True, "keep")
    return split, tokens.Tokenizer(json, 20, True, "keep")


def test_words_name_what_their_phrase_is_about(scenes):
    split, tokenizer = scenes
    said = {word for words in grammar.SYNONYMS.values() for w in words for word in w.split()}
    plain = {*grammar.COLORS, *grammar.SHAPES, *said, "shape", "thing"}
    for word in pointing.named_words(split, tokenizer)[:400]:
        record = split.record(word.image)
        text = record["captions"][word.caption - 5 * word.image]
        piece = tokenizer.pieces(text)[word.piece]
        assert piece.startswith("##") or any(p.startswith(piece) or piece.startswith(p) for p in plain), (text, piece)
        things = [t for t in record["scene"]["things"] if any(np.array_equal(t["box"], b) for b in word.boxes)]
        assert len(things) == len(word.boxes)
        if piece in grammar.COLORS:
            assert {t["color"] for t in things} == {piece}
        if piece in grammar.SHAPES:
            assert {t["shape"] for t in things} == {piece}


class Pointer:
    """A model whose words attend to the region given in their text's features."""

    matcher = types.SimpleNamespace(explain=None)

    @staticmethod
    def explain(params, image, text):
        return {"word_attention": text.fragments.T}  # (N, M)


def test_a_matcher_that_points_right_has_all_and_one_that_points_wrong_none(scenes, monkeypatch):
    split, tokenizer = scenes
    boxes = grid_boxes(3, 3)
    monkeypatch.setattr(pointing, "region_boxes", lambda config, model: boxes)
    config = types.SimpleNamespace(eval=types.SimpleNamespace(batch_size=64))
    evaluator = types.SimpleNamespace(config=config, model=Pointer(), tokenizer=tokenizer)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    right = np.zeros((split.num_captions, 20, 9), np.float32)
    for word in pointing.named_words(split, tokenizer):
        inside = (centres[:, None] >= word.boxes[:, :2]) & (centres[:, None] <= word.boxes[:, 2:])
        right[word.caption, word.piece] = inside.all(-1).any(-1)
    images = Features(np.zeros((30, 9, 4)), np.ones((30, 9), bool), np.zeros((30, 4)))

    def accuracy(attention):
        texts = Features(attention, np.ones((150, 20), bool), np.zeros((150, 4)))
        return pointing.pointing_accuracy(evaluator, None, images, texts, split)

    assert accuracy(right)["all"] == 100.0
    assert accuracy(1 - right)["all"] == 0.0
    chance = accuracy(right)["chance"]
    assert 5 < chance < 25  # one to three of nine cells
    anywhere = np.random.default_rng(0).random(right.shape).astype(np.float32)
    assert accuracy(anywhere)["all"] == pytest.approx(chance, abs=6)
    evaluator.model.matcher = types.SimpleNamespace()
    assert accuracy(right)["all"] is None


def test_boxes_are_those_of_the_encoders_grids():
    config = shapes.get_config("smoke")
    with config.unlocked():
        config.image.region_grids = (4, 2)
    found = region_boxes(config, build_model(config, 50))
    np.testing.assert_array_equal(found, np.concatenate([grid_boxes(4, 4), grid_boxes(2, 2)]))
