"""Grammar of the drawn scenes: meanings of captions, their wording, and a check for which scenes they are true.

A caption is made in two steps: first a `Meaning` (phrases about things, perhaps with a spatial relation), then words.
The meaning is kept, so that its truth can be checked for every other scene (`scenes_where_true`).
"""

import dataclasses
import itertools

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "banded")
ATTRIBUTES = {"size": SIZES, "texture": TEXTURES, "color": COLORS, "shape": SHAPES}  # in the word order of English
RELATIONS = ("left", "right", "above", "below")
MARGIN = 0.25  # smallest distance of two centers, in image widths, at which one is "left of" the other

SYNONYMS = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
    "striped": ("striped", "pinstriped"),  # vertical stripes
    "banded": ("banded", "layered"),  # horizontal stripes
    "plain": ("plain",),
    "circle": ("circle", "disc"),
    "cross": ("cross", "plus"),
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
# A relation can also be worded at both phrases: "a red circle on the left and a blue square on the right".
SIDE_PHRASES = {
    "left": ("on the left", "on the right"),
    "right": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
PLURALS = {"cross": "crosses", "plus": "pluses"}
NUMBERS = {2: "two", 3: "three"}
OPENINGS = ("", "", "a picture of", "this shows", "i see")


@dataclasses.dataclass(frozen=True)
class Thing:
    """Drawn object: its attributes, its center, and the radius of a disc of its area, in image widths."""

    shape: str
    color: str
    size: str
    texture: str
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class Phrase:
    """Phrase about `count` things with these attributes ("two blue squares"); `things` are their indices."""

    attributes: dict[str, str]
    count: int
    things: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Meaning:
    """Meaning of a caption: phrases joined by "and", or by a relation of the first phrase to the second."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None


@dataclasses.dataclass(frozen=True)
class Caption:
    """Caption: its text and meaning, and for each phrase the half-open span of its words (split at white space)."""

    text: str
    meaning: Meaning
    spans: tuple[tuple[int, int], ...]


def holds(relation, a, b):
    """Returns whether `a` is `relation` of `b`, bool `(...)`, for centers `(..., 2)` in image widths, y downwards."""
    axis, sign = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    return sign * (np.asarray(b)[..., axis] - np.asarray(a)[..., axis]) >= MARGIN


def relation_between(a: Thing, b: Thing) -> str | None:
    """Returns the relation of a to b along the axis on which they are further apart; None if they are too close."""
    pair = ("left", "right") if abs(a.x - b.x) >= abs(a.y - b.y) else ("above", "below")
    return next((r for r in pair if holds(r, (a.x, a.y), (b.x, b.y))), None)


def word_caption(meaning: Meaning, rng: np.random.Generator) -> Caption:
    """Words a meaning as a caption.

    One wording is drawn for every value of every attribute. Two meanings with the same values, bound to things
    differently, therefore use the same bag of words if their generators are in the same state.
    """
    wording = {value: str(rng.choice(words)) for value, words in SYNONYMS.items()}
    opening = str(rng.choice(OPENINGS))
    noun = str(rng.choice(("shape", "thing")))
    conjunction = str(rng.choice(("and", "with")))
    sides = SIDE_PHRASES[meaning.relation] if meaning.relation and rng.random() < 0.5 else ("",) * len(meaning.phrases)
    words, spans = opening.split(), []
    for k, (phrase, side) in enumerate(zip(meaning.phrases, sides, strict=True)):
        if k:
            is_related = meaning.relation and not side
            words += wording[meaning.relation].split() if is_related else [conjunction if k == 1 else "and"]
        phrase_words = _describe(phrase, wording, noun)
        spans.append((len(words), len(words) + len(phrase_words)))
        words += phrase_words + side.split()
    return Caption(" ".join(words), meaning, tuple(spans))


def _describe(phrase: Phrase, wording: dict[str, str], noun: str) -> list[str]:
    """Returns the words of a phrase; `noun` stands for a shape that it does not mention."""
    values = [phrase.attributes[a] for a in ATTRIBUTES if a in phrase.attributes and a != "shape"]
    words = [word for v in values for word in wording.get(v, v).split()]
    shape = phrase.attributes.get("shape")
    words.append(wording.get(shape, shape) if shape else noun)
    if phrase.count > 1:
        words[-1] = PLURALS.get(words[-1], words[-1] + "s")
        return [NUMBERS[phrase.count], *words]
    return ["an" if words[0][0] in "aeiou" else "a", *words]


class SceneTable:
    """Table of scenes as arrays, so that a meaning is checked against all of them at once.

    S scenes, K things at most in a scene. `exists` bool `(S, K)`, `centers` float64 `(S, K, 2)`, and `values`, a dict
    from attribute to its values, str `(S, K)`.
    """

    def __init__(self, scenes: list[list[Thing]]):
        max_things = max(len(things) for things in scenes)
        self.exists = np.zeros((len(scenes), max_things), bool)  # (S, K)
        self.centers = np.zeros((len(scenes), max_things, 2))  # (S, K, 2)
        self.values = {a: np.full((len(scenes), max_things), "", dtype="U8") for a in ATTRIBUTES}  # (S, K)
        for s, things in enumerate(scenes):
            for k, thing in enumerate(things):
                self.exists[s, k] = True
                self.centers[s, k] = thing.x, thing.y
                for a in ATTRIBUTES:
                    self.values[a][s, k] = getattr(thing, a)

    def matches(self, phrase: Phrase) -> np.ndarray:
        """Returns the things that have the attributes of a phrase, bool `(S, K)`."""
        fits = self.exists
        for a, value in phrase.attributes.items():
            fits = fits & (self.values[a] == value)
        return fits


def scenes_where_true(meaning: Meaning, table: SceneTable) -> np.ndarray:
    """Returns for which scenes a meaning is true, bool `(S,)`.

    "two X" means exactly two. Phrases in the singular must be about different things, and a relation holds between the
    things of the first two phrases.
    """
    matches = [table.matches(p) for p in meaning.phrases]
    is_true = np.ones(len(table.exists), bool)
    singular_matches = []
    for phrase, match in zip(meaning.phrases, matches, strict=True):
        if phrase.count > 1:
            is_true &= match.sum(1) == phrase.count
        else:
            singular_matches.append(match)
    is_bound = np.zeros_like(is_true)
    for thing_index in itertools.permutations(range(table.exists.shape[1]), len(singular_matches)):
        fits = np.ones_like(is_true)
        for match, k in zip(singular_matches, thing_index, strict=True):
            fits &= match[:, k]
        if meaning.relation:
            fits &= holds(meaning.relation, table.centers[:, thing_index[0]], table.centers[:, thing_index[1]])
        is_bound |= fits
    return is_true & is_bound


def to_json(value) -> dict:
    """Returns a `Thing`, `Phrase`, `Meaning` or `Caption` as plain JSON values."""
    return dataclasses.asdict(value)


def thing_from_json(value: dict) -> Thing:
    """Returns the Thing that `to_json` wrote."""
    return Thing(**value)


def meaning_from_json(value: dict) -> Meaning:
    """Returns the Meaning that `to_json` wrote."""
    phrases = tuple(Phrase(p["attributes"], p["count"], tuple(p["things"])) for p in value["phrases"])
    return Meaning(phrases, value["relation"])
