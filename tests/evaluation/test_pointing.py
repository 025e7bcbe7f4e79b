"""Pointing accuracy: the wordpieces that name a thing, and attention that is right, wrong or random."""

import dataclasses

import numpy as np
import pytest

from configs.default import get_config
from mefn_jax.data import tokenizer as tokens
from mefn_jax.data.scenes import draw as draw
from mefn_jax.data.scenes import grammar
from mefn_jax.data.split import Split
from mefn_jax.encoders.grids import grid_boxes
from mefn_jax.evaluation import pointing
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.features import Features
from mefn_jax.matching.cosine import PooledCosine
from mefn_jax.matching.matcher import Matcher
from mefn_jax.model import Model
from mefn_jax.runtime.sharding import make_mesh


@pytest.fixture(scope="module")
def scenes():
    records = list(draw.generate_examples("test", 30, 0))
    split = Split("test", records, np.arange(30), np.arange(31) * 5)
    json = tokens.train_tokenizer(split.all_captions(), 400, True, "keep")
    return split, tokens.Tokenizer(json, 20, True, "keep")


def test_named_words_match_their_phrase(scenes):
    split, tokenizer = scenes
    words = {word for words in grammar.SYNONYMS.values() for w in words for word in w.split()}
    named = {*grammar.COLORS, *grammar.SHAPES, *words, "shape", "thing"}
    for word in pointing.named_words(split, tokenizer)[:400]:
        record = split.record(word.image)
        text = record["captions"][word.caption - 5 * word.image]
        piece = tokenizer.pieces(text)[word.piece]
        assert piece.startswith("##") or any(p.startswith(piece) or piece.startswith(p) for p in named), (text, piece)
        things = [t for t in record["scene"]["things"] if any(np.array_equal(t["box"], b) for b in word.boxes)]
        assert len(things) == len(word.boxes)
        if piece in grammar.COLORS:
            assert {t["color"] for t in things} == {piece}
        if piece in grammar.SHAPES:
            assert {t["shape"] for t in things} == {piece}


class Pointer(Matcher, kw_only=True):
    """A matcher whose words attend to the regions that their text's fragments give."""

    def attention(self, image, text):
        return text.fragments.T  # (N, M)


def test_pointing_accuracy_of_right_wrong_and_random_attention(scenes, monkeypatch):
    split, tokenizer = scenes
    boxes = grid_boxes(3, 3)
    monkeypatch.setattr(pointing, "region_boxes", lambda config, model: boxes)
    pointer = Evaluator(Model(None, None, Pointer(), None, {}), tokenizer, get_config(), make_mesh())
    without_attention = dataclasses.replace(pointer, model=Model(None, None, PooledCosine(), None, {}))
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    right = np.zeros((split.num_captions, 20, 9), np.float32)
    for word in pointing.named_words(split, tokenizer):
        inside = (centers[:, None] >= word.boxes[:, :2]) & (centers[:, None] <= word.boxes[:, 2:])
        right[word.caption, word.piece] = inside.all(-1).any(-1)
    images = Features(np.zeros((30, 9, 4)), np.ones((30, 9), bool), np.zeros((30, 4)))

    def accuracy(attention, evaluator=pointer):
        texts = Features(attention, np.ones((150, 20), bool), np.zeros((150, 4)))
        return pointing.pointing_accuracy(evaluator, {"matcher": {}}, images, texts, split)

    assert accuracy(right)["all"] == 100.0
    assert accuracy(1 - right)["all"] == 0.0
    chance = accuracy(right)["chance"]
    assert 5 < chance < 25  # one to three of nine cells
    random = np.random.default_rng(0).random(right.shape).astype(np.float32)
    assert accuracy(random)["all"] == pytest.approx(chance, abs=6)
    assert accuracy(right, without_attention) == {"all": None, "chance": chance}
