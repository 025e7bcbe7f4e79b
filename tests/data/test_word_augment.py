"""Word noise: the rates of VSE-infinity, whole words, and captions that name a side."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.data import tokenizer as tok
from mefn_jax.data import word_augment

TEXTS = ["a dog runs on the grass", "two children playing", "unbelievable", "red car"]
TOKENIZER = tok.Tokenizer(tok.train_tokenizer(TEXTS * 3, 60, True, "keep"), 20, True, "keep")


def add_noise(caption, rate, seed, tokenizer=TOKENIZER):
    ids, mask, word_of_piece = (x[0] for x in tokenizer.encode([caption]))
    noisy = word_augment.add_word_noise(ids, mask, word_of_piece, rate, np.random.default_rng(seed), tokenizer)
    return ids, mask, word_of_piece, *noisy


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([*TEXTS, "zebra dog", ""]), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_word_noise_keeps_ends_and_follows_seed(caption, rate, seed):
    ids, mask, _, new, new_mask = add_noise(caption, rate, seed)
    number = int(new_mask.sum())
    assert new.shape == ids.shape
    assert new.dtype == ids.dtype
    assert new_mask[:number].all()
    assert (new[number:] == TOKENIZER.pad).all()
    assert new[0] == TOKENIZER.cls
    assert new[number - 1] == TOKENIZER.sep
    assert min(3, mask.sum()) <= number <= mask.sum()  # a caption never becomes empty
    repeated = add_noise(caption, rate, seed)
    np.testing.assert_array_equal(new, repeated[3])


def test_word_noise_has_rates_of_vse_infinity():
    rate, caption, counts = 0.2, "a dog runs on the grass two red car", np.zeros(3)
    for seed in range(3000):
        ids, mask, _, new, new_mask = add_noise(caption, rate, seed)
        dropped = mask.sum() - new_mask.sum()
        masked = np.sum(new == TOKENIZER.mask)
        old = ids[mask].tolist()
        inserted = sum(i not in old for i in new[new_mask].tolist()) - masked
        counts += dropped, masked, inserted
    dropped, masked, replaced = counts / (3000 * (mask.sum() - 2))
    assert masked == pytest.approx(0.5 * rate, rel=0.06)
    assert dropped == pytest.approx(0.4 * rate, rel=0.06)
    assert 0 < replaced <= 0.11 * rate  # a random wordpiece may also stand in the caption


def test_word_noise_changes_whole_words():
    caption = "unbelievably dogs"
    _, _, word_of_piece, *_ = add_noise(caption, 0.5, 0)
    lengths = np.bincount(word_of_piece[word_of_piece >= 0])
    assert (lengths > 1).all()
    possible = {0, *lengths.tolist(), int(lengths.sum())}
    for seed in range(300):
        _, mask, _, new, new_mask = add_noise(caption, 0.5, seed)
        assert np.sum(new == TOKENIZER.mask) in possible
        assert mask.sum() - new_mask.sum() in possible


def test_word_noise_drops_words_without_mask_token():
    class NoMask:
        mask, pad, ordinary = None, TOKENIZER.pad, TOKENIZER.ordinary

    ids, mask, word_of_piece = (x[0] for x in TOKENIZER.encode(["a dog runs on the grass"]))
    dropped = []
    for seed in range(1000):
        new, new_mask = word_augment.add_word_noise(ids, mask, word_of_piece, 0.2, np.random.default_rng(seed), NoMask)
        assert TOKENIZER.mask not in new
        dropped.append(mask.sum() - new_mask.sum())
    assert np.mean(dropped) / (mask.sum() - 2) == pytest.approx(0.9 * 0.2, rel=0.1)


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
def test_mentions_side_finds_left_and_right(caption, expected):
    assert word_augment.mentions_side(caption) == expected
