"""Random changes to captions in training, by whole words, as VSE-infinity has them (Chen et al. 2021)."""

import re

import numpy as np

SIDE = re.compile(r"\b(left|right)(most|wards?|hand(ed)?|side)?\b", re.IGNORECASE)
MASKED, REPLACED = 0.5, 0.6  # of the words that are chosen half are masked, a tenth replaced, the rest dropped


def mentions_side(caption: str) -> bool:
    """Whether the caption speaks of left or right, so that its image must not be mirrored."""
    return SIDE.search(caption) is not None


def add_word_noise(
    ids: np.ndarray, mask: np.ndarray, words: np.ndarray, rate: float, rng: np.random.Generator, tokenizer
):
    """Chooses each word with chance `rate`, and masks it, puts random wordpieces in its place, or drops it.

    `ids` int32, `mask` bool and `words` int `(L,)`, the number of the word that a place belongs to, -1 for none.
    Returns new `ids` and `mask`. A caption whose words were all to be dropped loses none. A tokenizer without a mask
    token (CLIP's) has the words dropped instead.
    """
    number = int(words.max()) + 1
    if not number:
        return ids, mask
    chance = rng.random(number) / rate
    random_ids = rng.choice(tokenizer.ordinary, len(ids))
    masked, replaced, chosen = chance < MASKED, (chance >= MASKED) & (chance < REPLACED), chance < 1
    if tokenizer.mask is None:
        masked = np.zeros(number, bool)
    dropped = chosen & ~masked & ~replaced
    dropped &= not dropped.all()
    new = np.where(_places(words, replaced), random_ids, ids)
    new = np.where(_places(words, masked), tokenizer.mask, new) if masked.any() else new
    kept = new[mask & ~_places(words, dropped)]
    ids = np.full_like(ids, tokenizer.pad)
    ids[: len(kept)] = kept
    return ids, np.arange(len(ids)) < len(kept)


def _places(words: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The places of the chosen words, bool `(L,)`."""
    return (words >= 0) & chosen[words]
