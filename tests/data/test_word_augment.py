"""Random changes to captions: the shares of VSE-infinity, whole words, and nothing where nothing is asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.data import tokenizer as tok
from mefn_jax.data import word_augment

TEXTS = ["a dog runs on the grass", "two children playing", "unbelievable", "red car"]
TOKENIZER = tok.Tokenizer(tok.train_tokenizer(TEXTS * 3, 60, True, "keep"), 20, True, "keep")


def altered(caption, rate, seed, tokenizer=TOKENIZER):
    ids, mask, numbered = (x[0] for x in tokenizer.encode([caption]))
    return (
        ids,
        mask,
        numbered,
        *word_augment.add_word_noise(ids, mask, numbered, rate, np.random.default_rng(seed), tokenizer),
    )


def test_wordpieces_know_their_word():
    pieces = TOKENIZER.pieces("dogs runs, so")
    numbered = TOKENIZER.encode(["dogs runs, so"])[2][0]
    assert numbered[0] == -1
    assert (numbered[len(pieces) + 1 :] == -1).all()
    starts = np.cumsum([not p.startswith("##") for p in pieces]) - 1
    np.testing.assert_array_equal(numbered[1 : len(pieces) + 1], starts)
    assert len(pieces) > numbered.max() + 1  # some word has several


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([*TEXTS, "zebra dog", ""]), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_ends_stay_and_what_is_left_keeps_its_order(caption, rate, seed):
    ids, mask, _, new, new_mask = altered(caption, rate, seed)
    number = int(new_mask.sum())
    assert new.shape == ids.shape
    assert new.dtype == ids.dtype
    assert new_mask[:number].all()
    assert (new[number:] == TOKENIZER.pad).all()
    assert new[0] == TOKENIZER.cls
    assert new[number - 1] == TOKENIZER.sep
    assert min(3, mask.sum()) <= number <= mask.sum()  # a caption is never emptied
    again = altered(caption, rate, seed)
    np.testing.assert_array_equal(new, again[3])


def test_the_shares_are_those_of_vse_infinity():
    rate, caption, counts = 0.2, "a dog runs on the grass two red car", np.zeros(3)
    for seed in range(3000):
        ids, mask, _, new, new_mask = altered(caption, rate, seed)
        dropped = mask.sum() - new_mask.sum()
        masked = np.sum(new == TOKENIZER.mask)
        old = ids[mask].tolist()
        foreign = sum(i not in old for i in new[new_mask].tolist()) - masked
        counts += dropped, masked, foreign
    dropped, masked, replaced = counts / (3000 * (mask.sum() - 2))
    assert masked == pytest.approx(0.5 * rate, rel=0.06)
    assert dropped == pytest.approx(0.4 * rate, rel=0.06)
    assert 0 < replaced <= 0.11 * rate  # a random wordpiece may be one of the caption's own


def test_words_change_whole():
    caption = "unbelievably dogs"
    _, _, numbered, *_ = altered(caption, 0.5, 0)
    lengths = np.bincount(numbered[numbered >= 0])
    assert (lengths > 1).all()
    possible = {0, *lengths.tolist(), int(lengths.sum())}
    for seed in range(300):
        _, mask, _, new, new_mask = altered(caption, 0.5, seed)
        assert np.sum(new == TOKENIZER.mask) in possible
        assert mask.sum() - new_mask.sum() in possible


def test_without_a_mask_token_words_are_dropped():
    class NoMask:
        mask, pad, ordinary = None, TOKENIZER.pad, TOKENIZER.ordinary

    ids, mask, numbered = (x[0] for x in TOKENIZER.encode(["a dog runs on the grass"]))
    lost = []
    for seed in range(1000):
        new, new_mask = word_augment.add_word_noise(ids, mask, numbered, 0.2, np.random.default_rng(seed), NoMask)
        assert TOKENIZER.mask not in new
        lost.append(mask.sum() - new_mask.sum())
    assert np.mean(lost) / (mask.sum() - 2) == pytest.approx(0.9 * 0.2, rel=0.1)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog left of a cat", True),
        ("the RIGHT hand", True),
        ("bright leftovers", False),
        ("Left, then", True),
        ("the leftmost", True),
        ("copyright", False),
    ],
)
def test_sides(caption, expected):
    assert word_augment.mentions_side(caption) == expected


def test_captions_are_encoded_once_and_the_same():
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
