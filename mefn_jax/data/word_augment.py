"""Word noise: random changes of whole words of training captions, as in VSE-infinity (Chen et al. 2021)."""

import re

import numpy as np

SIDE = re.compile(r"\b(left|right)(most|wards?|hand(ed)?|side)?\b", re.IGNORECASE)
# Cumulative fractions: half of the changed words are masked, a tenth is replaced, the rest is dropped.
MASKED, REPLACED = 0.5, 0.6


def mentions_side(caption: str) -> bool:
    """Returns whether a caption mentions left or right, so that its image must not be mirrored."""
    return SIDE.search(caption) is not None


def add_word_noise(
    ids: np.ndarray, mask: np.ndarray, words: np.ndarray, rate: float, rng: np.random.Generator, tokenizer
):
    """Changes each word with probability `rate`: masks it, replaces it by random wordpieces, or drops it.

    `ids` int32 and `mask` bool `(L,)` are one encoded caption, and `words` int `(L,)` is the word that each token
    belongs to, -1 for none. Returns new `ids` and `mask`. If all words of a caption were to be dropped, none is. With a
    tokenizer that has no mask token (CLIP's), words are dropped instead of masked.
    """
    num_words = int(words.max()) + 1
    if not num_words:
        return ids, mask
    draws = rng.random(num_words) / rate  # below 1 with probability `rate`
    random_ids = rng.choice(tokenizer.ordinary, len(ids))
    masked, replaced, changed = draws < MASKED, (draws >= MASKED) & (draws < REPLACED), draws < 1
    if tokenizer.mask is None:
        masked = np.zeros(num_words, bool)
    dropped = changed & ~masked & ~replaced
    dropped &= not dropped.all()
    new_ids = np.where(_select_tokens(words, replaced), random_ids, ids)
    new_ids = np.where(_select_tokens(words, masked), tokenizer.mask, new_ids) if masked.any() else new_ids
    kept_ids = new_ids[mask & ~_select_tokens(words, dropped)]
    ids = np.full_like(ids, tokenizer.pad)
    ids[: len(kept_ids)] = kept_ids
    return ids, np.arange(len(ids)) < len(kept_ids)


def _select_tokens(words: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """Returns which tokens belong to the selected words, bool `(L,)`; `selected` is bool `(num_words,)`."""
    return (words >= 0) & selected[words]
