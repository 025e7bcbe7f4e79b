"""What a caption of a drawn scene says, how it is worded, and of which scenes it is true.

A caption is made in two steps: a `Meaning` (phrases about things, and perhaps a spatial relation), then words. The
meaning is kept, so that truth can be checked against every other scene (`true_of`).
"""

import dataclasses
import itertools

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "banded")
ATTRIBUTES = {"size": SIZES, "texture": TEXTURES, "color": COLORS, "shape": SHAPES}  # in the order English says them
RELATIONS = ("left", "right", "above", "below")
MARGIN = 0.25  # how far apart two centres are, in image widths, before one is "left of" the other

SYNONYMS = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
    "striped": ("striped", "pinstriped"),  # upright
    "banded": ("banded", "layered"),  # level
    "plain": ("plain",),
    "circle": ("circle", "disc"),
    "cross": ("cross", "plus"),
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
# A relation can also be said of both: "a red circle on the left and a blue square on the right".
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
    """One drawn object: its attributes, its centre, and the radius of a disc of its area, in image widths."""

    shape: str
    color: str
    size: str
    texture: str
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class Phrase:
    """`count` things with these attributes ("two blue squares"); `things` are the indices it was made from."""

    attributes: dict[str, str]
    count: int
    things: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Meaning:
    """Phrases joined by "and", or with a relation: the first phrase is `relation` of the second."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None


@dataclasses.dataclass(frozen=True)
class Caption:
    """The text, and for each phrase the half-open span of whitespace-separated words that names its things."""

    text: str
    meaning: Meaning
    spans: tuple[tuple[int, int], ...]


def holds(relation, a, b):
    """Is a `relation` of b? `a`, `b` are centres `(..., 2)` in image widths, y downwards. Returns bool `(...)`."""
    axis, sign = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    return sign * (np.asarray(b)[..., axis] - np.asarray(a)[..., axis]) >= MARGIN


def relation_between(a: Thing, b: Thing) -> str | None:
    """The relation of a to b along the axis on which they are further apart, if they are far enough."""
    pair = ("left", "right") if abs(a.x - b.x) >= abs(a.y - b.y) else ("above", "below")
    return next((r for r in pair if holds(r, (a.x, a.y), (b.x, b.y))), None)


def word_caption(meaning: Meaning, rng: np.random.Generator) -> Caption:
    """Words for a meaning. One wording is drawn for each value, so two meanings with the same values, differently
    bound, worded from equal generators, use the same bag of words."""
    wording = {value: str(rng.choice(words)) for value, words in SYNONYMS.items()}
    opening = str(rng.choice(OPENINGS))
    noun = str(rng.choice(("shape", "thing")))
    joint = str(rng.choice(("and", "with")))
    sides = SIDE_PHRASES[meaning.relation] if meaning.relation and rng.random() < 0.5 else ("",) * len(meaning.phrases)
    words, spans = opening.split(), []
    for k, (phrase, side) in enumerate(zip(meaning.phrases, sides, strict=True)):
        if k:
            related = meaning.relation and not side
            words += wording[meaning.relation].split() if related else [joint if k == 1 else "and"]
        described = _describe(phrase, wording, noun)
        spans.append((len(words), len(words) + len(described)))
        words += described + side.split()
    return Caption(" ".join(words), meaning, tuple(spans))


def _describe(phrase: Phrase, wording: dict[str, str], noun: str) -> list[str]:
    values = [phrase.attributes[a] for a in ATTRIBUTES if a in phrase.attributes and a != "shape"]
    words = [word for v in values for word in wording.get(v, v).split()]
    shape = phrase.attributes.get("shape")
    words.append(wording.get(shape, shape) if shape else noun)
    if phrase.count > 1:
        words[-1] = PLURALS.get(words[-1], words[-1] + "s")
        return [NUMBERS[phrase.count], *words]
    return ["an" if words[0][0] in "aeiou" else "a", *words]


class SceneTable:
    """Many scenes as arrays, so that one meaning is checked against all of them at once."""

    def __init__(self, scenes: list[list[Thing]]):
        most = max(len(things) for things in scenes)
        self.exists = np.zeros((len(scenes), most), bool)  # (S, K)
        self.centers = np.zeros((len(scenes), most, 2))  # (S, K, 2)
        self.values = {a: np.full((len(scenes), most), "", dtype="U8") for a in ATTRIBUTES}  # (S, K)
        for s, things in enumerate(scenes):
            for k, thing in enumerate(things):
                self.exists[s, k] = True
                self.centers[s, k] = thing.x, thing.y
                for a in ATTRIBUTES:
                    self.values[a][s, k] = getattr(thing, a)

    def matches(self, phrase: Phrase) -> np.ndarray:
        """Which things of which scenes fit the phrase's attributes: bool `(S, K)`."""
        fits = self.exists
        for a, value in phrase.attributes.items():
            fits = fits & (self.values[a] == value)
        return fits


def scenes_where_true(meaning: Meaning, table: SceneTable) -> np.ndarray:
    """Of which scenes a meaning is true: bool `(S,)`.

    "two X" means exactly two. Phrases about one thing must be about different things, and a relation holds between
    the things that the first two phrases are about.
    """
    matches = [table.matches(p) for p in meaning.phrases]
    true = np.ones(len(table.exists), bool)
    single = []
    for phrase, match in zip(meaning.phrases, matches, strict=True):
        if phrase.count > 1:
            true &= match.sum(1) == phrase.count
        else:
            single.append(match)
    found = np.zeros_like(true)
    for chosen in itertools.permutations(range(table.exists.shape[1]), len(single)):
        fits = np.ones_like(true)
        for match, k in zip(single, chosen, strict=True):
            fits &= match[:, k]
        if meaning.relation:
            fits &= holds(meaning.relation, table.centers[:, chosen[0]], table.centers[:, chosen[1]])
        found |= fits
    return true & found


def to_json(value) -> dict:
    """A `Thing`, `Phrase`, `Meaning` or `Caption` as plain JSON values."""
    return dataclasses.asdict(value)


def thing_from_json(value: dict) -> Thing:
    """The Thing that `to_json` wrote."""
    return Thing(**value)


def meaning_from_json(value: dict) -> Meaning:
    """The Meaning that `to_json` wrote."""
    phrases = tuple(Phrase(p["attributes"], p["count"], tuple(p["things"])) for p in value["phrases"])
    return Meaning(phrases, value["relation"])
