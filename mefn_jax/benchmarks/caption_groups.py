"""Groups of captions by what they say: their length, how many things they name, attributes and relations. C captions.

The words are English. What a caption names is read from its words alone, without a parser: a thing is counted for each
article, number or possessive, unless a place follows ("to the left of"). These numbers are estimates.
"""

import itertools
import re
from collections.abc import Callable

import numpy as np

LENGTH_GROUPS = 5  # groups of captions by length, of about the same size
MOST_THINGS = 4  # captions that name more things are in the group of these
THING_NAMES = {1: "1 thing", 2: "2 things", 3: "3 things", MOST_THINGS: f"{MOST_THINGS} or more things"}
# Words that begin a phrase about a thing, unless a word of a place or of the picture follows ("to the left of").
THING_WORDS = (
    *("a", "an", "the", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "some"),
    *("several", "many", "another", "each", "every", "his", "her", "its", "their", "my", "your", "our"),
)
PICTURE_WORDS = ("picture", "photo", "photograph", "image", "view", "shot", "close-up", "closeup")
ATTRIBUTE_WORDS = (
    *("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown", "black", "white", "gray", "grey"),
    *("golden", "silver", "beige", "tan", "colored", "colorful", "small", "little", "tiny", "large", "big", "huge"),
    *("tall", "short", "long", "wide", "narrow", "young", "old", "elderly", "wooden", "metal", "metallic", "plastic"),
    *("glass", "brick", "stone", "leather", "striped", "pinstriped", "banded", "layered", "plain", "checkered"),
    *("spotted", "plaid", "floral", "shiny", "dark", "light", "bright", "wet", "dry", "dirty", "clean", "empty"),
    *("full", "open", "closed", "round", "furry", "fluffy", "bald", "blond", "blonde", "bearded"),
)
RELATION_WORDS = (
    *("left", "right", "above", "below", "over", "under", "underneath", "beneath", "behind", "beside", "besides"),
    *("between", "near", "next", "front", "top", "bottom", "inside", "outside", "across", "along", "around", "toward"),
    *("towards", "through", "against", "among", "into", "onto", "off", "atop", "amid", "opposite", "facing", "past"),
)


def read_words(caption: str) -> list[str]:
    """Returns the words of a caption in lower case."""
    return re.findall(r"[\w-]+", caption.lower())


def has_word_of(captions: list[str], words: tuple[str, ...]) -> np.ndarray:
    """Returns which captions contain at least one of `words`, bool `(C,)`."""
    return np.array([not frozenset(words).isdisjoint(read_words(caption)) for caption in captions])


def count_things(caption: str) -> int:
    """Counts the things that a caption names, at least 1."""
    words = [*read_words(caption), ""]
    no_things = frozenset(RELATION_WORDS + PICTURE_WORDS + THING_WORDS)
    starts = [word in THING_WORDS and after not in no_things for word, after in itertools.pairwise(words)]
    return max(1, sum(starts))


def group_by_length(captions: list[str]) -> tuple[np.ndarray, list[str]]:
    """Groups captions by their number of words into groups of about the same size: `(group int64 (C,), names)`."""
    lengths = np.array([len(re.findall(r"\w+", caption)) for caption in captions])
    ends = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_GROUPS + 1)[1:], method="higher"))
    group = np.searchsorted(ends, lengths)
    ranges = [(lengths[group == k].min(), lengths[group == k].max()) for k in range(len(ends))]
    return group, [str(low) if low == high else f"{low} to {high}" for low, high in ranges]


def group_by_things(captions: list[str]) -> tuple[np.ndarray, list[str]]:
    """Groups captions by how many things they name, as `group_by_length` does."""
    counts = np.minimum([count_things(caption) for caption in captions], MOST_THINGS)
    present = np.unique(counts)
    return np.searchsorted(present, counts), [THING_NAMES[k] for k in present.tolist()]


def group_by_words(words: tuple[str, ...]) -> Callable:
    """Returns the function that groups captions into those without any of `words` and those with some, as
    `group_by_length` does."""

    def group(captions: list[str]) -> tuple[np.ndarray, list[str]]:
        has_words = has_word_of(captions, words)
        present = np.unique(has_words)
        return np.searchsorted(present, has_words), [("with" if k else "without") for k in present.tolist()]

    return group


# What captions are grouped by: the name in the table, how a sentence names two groups, and the function.
GROUPINGS = {
    "words": ("of {} words", group_by_length),
    "things": ("that name {}", group_by_things),
    "attribute words": ("{} attribute words", group_by_words(ATTRIBUTE_WORDS)),
    "relation words": ("{} relation words", group_by_words(RELATION_WORDS)),
}
