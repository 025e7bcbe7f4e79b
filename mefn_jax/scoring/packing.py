"""Texts of any lengths, packed into groups of one size, so that no padding is scored and one program fits them all."""

import itertools

import numpy as np

from mefn_jax.features import Features

GROUP_WORDS = 128  # of a group: what a product needs to run at full speed, and few enough for sums as products
GROUP_TEXTS = 16  # of a group, at most
LOOKAHEAD = 4  # texts of an order, of which the one that fills a group best comes first


def pack(texts: Features) -> tuple[tuple, int, np.ndarray]:
    """Texts (Features of NumPy arrays) in groups: their arrays as of `fill`, of as many groups as the next power of
    two, so that few programs are compiled; how many there are; and each text's place `(C,)` among the `K T`."""
    words, captions, place = plan_groups(texts.mask)
    more = (1 << (len(words) - 1).bit_length()) - len(words)
    groups = (np.pad(x, ((0, more), (0, 0)), constant_values=-1) for x in (words, captions))
    return gather_groups(texts, *groups), len(words), place


def gather_groups(
    texts: Features, words: np.ndarray, captions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays of groups of texts, `words (K, L)` and `captions (K, T)` as of `layout`: `(vectors (K, L, D), of
    (K, L, T), pooled (K, T, D))`, float32, what `sides.packed` takes."""
    vectors = texts.fragments.reshape(texts.mask.size, -1)[words]
    vectors[words < 0] = 0
    pooled = texts.pooled[captions]
    pooled[captions < 0] = 0
    of = np.where(words >= 0, words // texts.mask.shape[1], -2)[..., None] == captions[:, None]
    return vectors, of.astype(np.float32), pooled


def plan_groups(mask: np.ndarray, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts of which those words exist that `mask` bool `(C, M)` says, in groups: the longest first, each into the
    fullest group that takes it; or about in an `order (C,)`, which fills groups less and keeps neighbours together.

    Returns `words (K, L)` and `texts (K, T)`, int32, which of all `C M` words, and which of the texts, stand where, -1
    for none; and each text's place `(C,)` among the `K T`. L is WORDS, or what the longest text needs; T is TEXTS.
    """
    lengths = mask.sum(1)
    size = max(GROUP_WORDS, -(-int(lengths.max(initial=0)) // 64) * 64)
    group, slot, start = best_fit_decreasing(lengths, size) if order is None else next_fit(lengths, order, size)
    number = int(group.max(initial=-1)) + 1
    words, texts = np.full((number, size), -1, np.int32), np.full((number, GROUP_TEXTS), -1, np.int32)
    text, word = np.nonzero(mask)
    first = np.cumsum(lengths) - lengths
    words[group[text], start[text] + np.arange(len(text)) - first[text]] = text * mask.shape[1] + word
    texts[group, slot] = np.arange(len(mask))
    return words, texts, group * GROUP_TEXTS + slot


def best_fit_decreasing(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
        if texts[here] < GROUP_TEXTS:
            with_room[room - length].append(here)
    return group, slot, start


def next_fit(lengths, order, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `arrange`: into the last group goes the longest that it takes of the next few of `order`, or a new one is
    begun."""
    lengths, rest = lengths.tolist(), iter(order.tolist())
    places, here, texts, used = np.zeros((len(lengths), 3), np.int64), 0, 0, 0
    few = list(itertools.islice(rest, LOOKAHEAD))
    while few:
        fitting = [k for k in few if used + lengths[k] <= size and texts < GROUP_TEXTS]
        if not fitting:
            here, texts, used = here + 1, 0, 0
            continue
        k = max(fitting, key=lengths.__getitem__)
        few.remove(k)
        few += itertools.islice(rest, 1)
        places[k] = here, texts, used
        texts, used = texts + 1, used + lengths[k]
    return tuple(places.T)
