"""Normalization and tokenization of captions."""

import json

import numpy as np

from mefn_jax.data import tokenizer as tok


def test_normalize_caption_lowercases_and_drops_punctuation():
    assert tok.normalize_caption("  A Dog, runs . ", True, "keep") == "a dog, runs ."
    assert tok.normalize_caption("  A Dog, runs . ", False, "drop") == "A Dog runs"


def test_tokenizer_encodes_unseen_words_as_pieces_and_truncates():
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


def test_train_tokenizer_ignores_order_of_captions():
    captions = [
        f"a {c} {s} left of a {d} {s}" for c in ("red", "blue") for d in ("green", "red") for s in ("disc", "star")
    ]
    assert tok.train_tokenizer(captions, 300, True, "keep") == tok.train_tokenizer(captions[::-1], 300, True, "keep")


TEXTS = ["a dog runs on the grass", "two children playing", "unbelievable", "red car"]
TOKENIZER = tok.Tokenizer(tok.train_tokenizer(TEXTS * 3, 60, True, "keep"), 20, True, "keep")


def test_tokenizer_numbers_wordpieces_by_word():
    pieces = TOKENIZER.pieces("dogs runs, so")
    word_of_piece = TOKENIZER.encode(["dogs runs, so"])[2][0]
    assert word_of_piece[0] == -1
    assert (word_of_piece[len(pieces) + 1 :] == -1).all()
    starts = np.cumsum([not p.startswith("##") for p in pieces]) - 1
    np.testing.assert_array_equal(word_of_piece[1 : len(pieces) + 1], starts)
    assert len(pieces) > word_of_piece.max() + 1  # some word has several wordpieces


def test_encoded_captions_encodes_each_caption_once():
    calls = []

    class Counting(tok.Tokenizer):
        def encode(self, captions):
            calls.extend(captions)
            return super().encode(captions)

    encoded = tok.EncodedCaptions(Counting(TOKENIZER.json, 20, True, "keep"), 4)
    for positions in ([2, 0], [0, 1, 2], [3, 3]):
        texts = [TEXTS[k] for k in positions]
        for found, expected in zip(encoded(np.array(positions), texts), TOKENIZER.encode(texts), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert calls == [TEXTS[2], TEXTS[0], TEXTS[1], TEXTS[3], TEXTS[3]]
