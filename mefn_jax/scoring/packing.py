"""Packing of texts of any lengths into groups of one size: no padding is scored, and one program fits all groups
(docs/method.md, section 8)."""

import itertools

import numpy as np

from mefn_jax.features import Features

# Columns of a group: enough for matrix products to run at full speed, few enough for sums to be matrix products.
GROUP_WORDS = 128
GROUP_TEXTS = 16  # largest number of texts in a group
LOOKAHEAD = 4  # next texts of an order, of which the longest that fits goes into a group first


def pack(texts: Features) -> tuple[tuple, int, np.ndarray]:
    """Packs texts (Features of NumPy arrays) into K groups.

    Returns the arrays of the groups, the number of groups that are not filling, and each text's slot `(C,)` among the
    `K T`. The arrays are `(vectors (K, L, D), membership (K, L, T), captions (K, T), pooled (C, D))`: those of
    `gather_groups`, but with the pooled embeddings of all texts and, int32, which of them stand in the slots (-1 where
    empty). So that few programs are compiled, there are empty groups up to the next power of two, and zeros up to a
    multiple of GROUP_WORDS texts.
    """
    words, captions, slot = plan_groups(texts.mask)
    missing = (1 << (len(words) - 1).bit_length()) - len(words)
    filled_words, filled_captions = (np.pad(x, ((0, missing), (0, 0)), constant_values=-1) for x in (words, captions))
    vectors, membership = _gather_words(texts, filled_words, filled_captions)
    pooled = np.pad(texts.pooled, ((0, -len(texts.pooled) % GROUP_WORDS), (0, 0)))
    return (vectors, membership, filled_captions, pooled), len(words), slot


def gather_groups(
    texts: Features, words: np.ndarray, captions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the arrays of groups of texts, `words (K, L)` and `captions (K, T)` as planned by `plan_groups`:
    `(vectors (K, L, D), membership (K, L, T), pooled (K, T, D))`, float32, the arguments of `layouts.to_packed`."""
    pooled = texts.pooled[captions]
    pooled[captions < 0] = 0
    return *_gather_words(texts, words, captions), pooled


def _gather_words(texts: Features, words: np.ndarray, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first two arrays of `gather_groups`: `vectors (K, L, D)` and `membership (K, L, T)`, float32."""
    vectors = texts.fragments.reshape(texts.mask.size, -1)[words]
    vectors[words < 0] = 0
    # -2 for a column without a word, so that it does not belong to a slot without a text (-1).
    membership = np.where(words >= 0, words // texts.mask.shape[1], -2)[..., None] == captions[:, None]
    return vectors, membership.astype(np.float32)


def plan_groups(mask: np.ndarray, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Plans which texts share a group of L columns of words and T slots, for texts with the words of `mask` bool
    `(C, M)`: best-fit decreasing, or, with `order (C,)`, nearly in that order, so that neighbors share a group (which
    fills groups less).

    Returns `words (K, L)` (indices into all `C M` words) and `texts (K, T)` (indices of texts), int32, -1 where empty,
    and each text's slot `(C,)` among the `K T`. L is GROUP_WORDS, or as many as the longest text needs, a multiple of
    64; T is GROUP_TEXTS.
    """
    lengths = mask.sum(1)
    size = max(GROUP_WORDS, -(-int(lengths.max(initial=0)) // 64) * 64)
    group, slot, start = best_fit_decreasing(lengths, size) if order is None else next_fit(lengths, order, size)
    num_groups = int(group.max(initial=-1)) + 1
    words, texts = np.full((num_groups, size), -1, np.int32), np.full((num_groups, GROUP_TEXTS), -1, np.int32)
    text, word = np.nonzero(mask)
    first = np.cumsum(lengths) - lengths
    words[group[text], start[text] + np.arange(len(text)) - first[text]] = text * mask.shape[1] + word
    texts[group, slot] = np.arange(len(mask))
    return words, texts, group * GROUP_TEXTS + slot


def best_fit_decreasing(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs texts of `lengths (C,)` into groups of `size` words: the longest first, each into the fullest group that
    still takes it. Returns for each text its group, its slot in the group, and the column where its words start."""
    group, slot, start = (np.zeros(len(lengths), np.int64) for _ in range(3))
    used, texts = [], []  # words and texts of each group
    groups_by_room = [[] for _ in range(size + 1)]  # groups that still take a text, by the columns that are left
    for k in np.argsort(-lengths, kind="stable"):
        length = int(lengths[k])
        room = next((r for r in range(length, size + 1) if groups_by_room[r]), None)
        if room is None:
            room, target = size, len(used)
            used.append(0)
            texts.append(0)
        else:
            target = groups_by_room[room].pop()
        group[k], slot[k], start[k] = target, texts[target], used[target]
        used[target] += length
        texts[target] += 1
        if texts[target] < GROUP_TEXTS:
            groups_by_room[room - length].append(target)
    return group, slot, start


def next_fit(lengths, order, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs texts nearly in `order (C,)`: of its next LOOKAHEAD texts, puts the longest that fits into the last group;
    opens a new group when none fits. Arguments and results are otherwise those of `best_fit_decreasing`."""
    lengths, remaining = lengths.tolist(), iter(order.tolist())
    placement, group, slot, used = np.zeros((len(lengths), 3), np.int64), 0, 0, 0
    candidates = list(itertools.islice(remaining, LOOKAHEAD))
    while candidates:
        fitting = [k for k in candidates if used + lengths[k] <= size and slot < GROUP_TEXTS]
        if not fitting:
            group, slot, used = group + 1, 0, 0
            continue
        k = max(fitting, key=lengths.__getitem__)
        candidates.remove(k)
        candidates += itertools.islice(remaining, 1)
        placement[k] = group, slot, used
        slot, used = slot + 1, used + lengths[k]
    return tuple(placement.T)
