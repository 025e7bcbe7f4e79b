"""Packing of captions: every text gets a place, groups keep their size, and the order is nearly kept."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from random_features import random_features

from mefn_jax.scoring.packing import GROUP_TEXTS, GROUP_WORDS, LOOKAHEAD, best_fit_decreasing, pack, plan_groups


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(30, 64))
def test_best_fit_decreasing_places_every_text_once(lengths, size):
    lengths = np.array(lengths)
    group, slot, start = best_fit_decreasing(lengths, size)
    for k in range(group.max() + 1):
        members = np.flatnonzero(group == k)
        assert sorted(slot[members]) == list(range(len(members)))
        assert len(members) <= GROUP_TEXTS
        members = members[np.argsort(slot[members])]
        np.testing.assert_array_equal(start[members], np.cumsum(lengths[members]) - lengths[members])
        assert lengths[members].sum() <= size
    # No two groups with free slots could be merged.
    used = np.bincount(group, lengths)
    room = (size - used)[np.bincount(group) < GROUP_TEXTS]
    assert np.sum(room > size / 2) <= 1 or lengths.sum() == 0


@settings(deadline=None)
@given(st.data(), st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_plan_groups_nearly_keeps_order(data, lengths):
    """Every word and every text has one place, and a text comes at most LOOKAHEAD - 1 places early."""
    order = np.array(data.draw(st.permutations(range(len(lengths)))))
    mask = np.arange(40) < np.array(lengths)[:, None]
    words, texts, place = plan_groups(mask, order)
    np.testing.assert_array_equal(np.sort(words[words >= 0]), np.flatnonzero(mask))
    np.testing.assert_array_equal(texts.ravel()[place], np.arange(len(lengths)))
    text_of_word = np.where(words >= 0, words // 40, -1)
    for members, members_of_words in zip(texts, text_of_word, strict=True):
        assert set(members_of_words) - {-1} <= set(members)
    rank = np.argsort(order)[np.argsort(place)]  # the place in `order` of the text that comes first, second, ...
    assert np.all(rank <= np.arange(len(rank)) + LOOKAHEAD - 1)


def test_pack_lengthens_group_for_long_text():
    mask = np.zeros((2, 200), bool)
    mask[0, :150], mask[1, 3:5] = True, True
    (vectors, text_of_word, captions, pooled), number, slots = pack(random_features(0, 2, 200, 6, mask))
    assert vectors.shape[1] == text_of_word.shape[1] == 192
    assert number == 1
    assert text_of_word[0].sum(0)[slots].tolist() == [150, 2]
    assert captions[0][slots].tolist() == [0, 1]
    assert pooled.shape == (GROUP_WORDS, 6)
