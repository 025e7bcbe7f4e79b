"""Texts of any lengths, packed into groups of one size, so that no padding is scored and one program fits them all."""

import numpy as np

from mefn_jax.matching.features import Features

WORDS = 128  # of a group: what a product needs to run at full speed, and few enough for sums as products
TEXTS = 16  # of a group, at most


def pack(texts: Features, order: np.ndarray | None = None) -> tuple[tuple, int, np.ndarray]:
    """Texts (Features of NumPy arrays) in groups: the longest first, each into the fullest group that takes it; or one
    after the other in an `order (C,)`, which fills groups less and keeps neighbours together.

    Returns `(vectors (K, L, D), of (K, L, T), pooled (K, T, D))`, float32, what `sides.packed` takes; how many groups
    there are, the K being the next power of two, so that few programs are compiled; and each text's place `(C,)` among
    the `K T`. L is WORDS, or what the longest text needs; T is TEXTS.
    """
    lengths = texts.mask.sum(1)
    size = max(WORDS, -(-int(lengths.max(initial=0)) // 64) * 64)
    group, slot, start = arrange(lengths, size) if order is None else one_after_the_other(lengths, order, size)
    number = int(group.max(initial=-1)) + 1
    room = 1 << (number - 1).bit_length()
    of = np.zeros((room, size, TEXTS), np.float32)
    pooled = np.zeros((room, TEXTS, texts.pooled.shape[-1]), np.float32)
    text, word = np.nonzero(texts.mask)
    first = np.cumsum(lengths) - lengths
    place = start[text] + np.arange(len(text)) - first[text]
    taken = np.full((room, size), -1, np.int64)  # which of all words stands where
    taken[group[text], place] = np.ravel_multi_index((text, word), texts.mask.shape)
    vectors = texts.fragments.reshape(texts.mask.size, -1)[taken]
    vectors[taken < 0] = 0
    of[group[text], place, slot[text]] = 1
    pooled[group, slot] = texts.pooled
    return (vectors, of, pooled), number, group * TEXTS + slot


def arrange(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For texts of these lengths: the group of each, which text of the group it is, and where its words begin there."""
    group, slot, start = (np.zeros(len(lengths), np.int64) for _ in range(3))
    used, texts = [], []  # of each group
    with_room = [[] for _ in range(size + 1)]  # groups that still take a text, by the words that are left
    for k in np.argsort(-lengths, kind="stable"):
        length = int(lengths[k])
        room = next((r for r in range(length, size + 1) if with_room[r]), None)
        if room is None:
            room, here = size, len(used)
            used.append(0)
            texts.append(0)
        else:
            here = with_room[room].pop()
        group[k], slot[k], start[k] = here, texts[here], used[here]
        used[here] += length
        texts[here] += 1
        if texts[here] < TEXTS:
            with_room[room - length].append(here)
    return group, slot, start


def one_after_the_other(lengths, order, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `arrange`, a new group whenever the next of `order` does not go into the last one."""
    places, here, texts, used = np.zeros((len(lengths), 3), np.int64), 0, 0, 0
    for k in order:
        if used + lengths[k] > size or texts == TEXTS:
            here, texts, used = here + 1, 0, 0
        places[k] = here, texts, used
        texts, used = texts + 1, used + int(lengths[k])
    return tuple(places.T)
