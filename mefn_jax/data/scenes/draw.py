"""Built-in data set of drawn scenes with five captions each (docs/scenes.md).

Everything is a function of the seed. Two neighboring images of a split may be twins, a minimal pair as in Winoground:
two of their things have swapped their colors, their textures or their places. Captions that tell twins apart use the
same words.
"""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageDraw

from mefn_jax.data.scenes import grammar
from mefn_jax.data.scenes.grammar import Meaning, Phrase, Thing

SCENE_PIXELS = 96
SCENE_CAPTIONS = 5
# All shapes of a size have the same area, so that a swap of colors does not change the image's color histogram.
RADIUS = {"small": 0.065, "large": 0.1}  # radius of a disc of that area, in image widths
REACH = {"circle": 1.0, "square": 0.886, "triangle": 1.347, "cross": 1.33}  # half the side of the box, in radii
LATTICE = 3  # things stand in the cells of a 3 x 3 lattice, as in SHAPES (Andreas et al. 2016)
CENTER_JITTER = 0.015  # largest offset of a thing from the center of its cell, in image widths
COLOR_VALUES = {
    "red": (205, 50, 50),
    "green": (50, 165, 70),
    "blue": (60, 90, 210),
    "yellow": (210, 195, 50),
    "purple": (150, 60, 190),
}
CONTRAST = 64  # difference of a texture's light and dark halves from the thing's color, which stays nearly their mean
OUTLINE = 2  # pixels of dark line around a thing, so that its shape is visible whatever its color
OUTLINE_COLOR = (20, 20, 20)
TWIN_SHARE = 0.5  # fraction of scenes that have a twin
# Probability of each kind of twins. Two things have swapped their places, or their colors (if they differ in shape), or
# their textures (if they differ in color).
TWIN_KINDS = {"place": 0.4, "color": 0.3, "texture": 0.3}
# Attributes, by kind of twin, that differ between the two things and that both of their phrases mention.
MENTIONED = {
    "texture": ("texture", "color"),
    "color": ("color", "shape"),
    "place": ("color", "shape"),
}
# Attributes in which the two things agree, because a color histogram would tell the twins apart otherwise.
ALIKE = {"texture": ("size",), "color": ("size", "texture"), "place": ("size",)}
SPLIT_CODES = {"train": 0, "val": 1, "test": 2}


def generate_examples(split: str, scenes: int, seed: int):
    """Yields `scenes` examples `{image: JPEG bytes, captions: [str], image_id: str, scene: dict}`, in order.

    `scene` is the ground truth: `things` (attributes, center, `box` as x0, y0, x1, y1 in image widths), `captions`
    (text, meaning, word spans), and `twin` (`index` of the twin in the split, `kind`), which is None without a twin.
    """
    index = 0
    for pair in range(scenes):
        if index >= scenes:
            return
        rng = np.random.default_rng([seed, SPLIT_CODES[split], pair])
        for scene in _generate_pair_or_single(rng, index, room=scenes - index):
            yield {
                "image": draw_scene(scene["things"], np.random.default_rng([seed, SPLIT_CODES[split], pair, 1])),
                "captions": [c.text for c in scene["captions"]],
                "image_id": f"{split}-{index:05d}",
                "scene": _to_json(scene),
            }
            index += 1


def _generate_pair_or_single(rng, index: int, room: int) -> list[dict]:
    """Draws the scene at `index`, or that and its twin if `room`, the number of missing scenes, allows two."""
    # TWIN_SHARE counts scenes, and a pair has two of them, so a pair has the probability share / (2 - share).
    twins = room >= 2 and rng.random() < TWIN_SHARE / (2 - TWIN_SHARE)
    if not twins:
        things, groups = _draw_things(rng)
        return [{"things": things, "captions": _draw_captions(rng, things, groups), "twin": None}]
    kind = str(rng.choice(list(TWIN_KINDS), p=list(TWIN_KINDS.values())))
    things, groups = _draw_things(rng, differ=kind)
    twin_things = _swap(things, kind)
    meanings = [_draw_twin_meaning(rng, things, kind) for _ in range(SCENE_CAPTIONS)]
    seeds = rng.integers(2**32, size=SCENE_CAPTIONS)
    captions = [grammar.word_caption(m, np.random.default_rng(s)) for m, s in zip(meanings, seeds, strict=True)]
    twin_captions = [
        grammar.word_caption(_mirror(m, twin_things, kind), np.random.default_rng(s))
        for m, s in zip(meanings, seeds, strict=True)
    ]
    return [
        {"things": things, "captions": captions, "twin": {"index": index + 1, "kind": kind}},
        {"things": twin_things, "captions": twin_captions, "twin": {"index": index, "kind": kind}},
    ]


def _draw_things(rng, differ: str | None = None) -> tuple[list[Thing], list[tuple[int, ...]]]:
    """Draws two to four things that do not overlap; returns them and the groups of equal things, as positions.

    For a twin of the kind `differ`, the first two things are alone in their groups, differ in the attributes that
    `MENTIONED` names, and agree in those that `ALIKE` names.
    """
    while True:
        kinds = [
            {a: str(rng.choice(values)) for a, values in grammar.ATTRIBUTES.items()} for _ in range(rng.integers(2, 4))
        ]
        if differ:
            kinds[1] |= {a: kinds[0][a] for a in ALIKE[differ]}
        if differ == "texture":  # these two textures have the same color histogram
            kinds[0]["texture"], kinds[1]["texture"] = (str(t) for t in rng.permutation(("striped", "banded")))
        counts = [1] * len(kinds)
        if rng.random() < 0.35 and (differ is None or len(kinds) > 2):
            counts[-1] = int(rng.integers(2, 4 if len(kinds) == 2 else 3))
        if len({(k["shape"], k["color"]) for k in kinds}) < len(kinds):
            continue
        if differ and any(kinds[0][a] == kinds[1][a] for a in MENTIONED[differ]):
            continue
        group_index = [k for k, count in enumerate(counts) for _ in range(count)]
        things = [
            Thing(**kinds[k], x=x, y=y, radius=RADIUS[kinds[k]["size"]])
            for k, (x, y) in zip(group_index, _draw_places(rng, len(group_index)), strict=True)
        ]
        if differ == "place" and grammar.relation_between(things[0], things[1]) is None:
            continue
        return things, [tuple(i for i, group in enumerate(group_index) if group == k) for k in range(len(kinds))]


def _draw_places(rng, number: int) -> list[tuple[float, float]]:
    """Draws centers in different cells of the lattice."""
    rows, columns = np.divmod(rng.permutation(LATTICE**2)[:number], LATTICE)
    centers = (np.stack([columns, rows], -1) + 0.5) / LATTICE + rng.uniform(-CENTER_JITTER, CENTER_JITTER, (number, 2))
    return [(round(float(x), 4), round(float(y), 4)) for x, y in centers]


def _swap(things: list[Thing], kind: str) -> list[Thing]:
    """Returns the things of the twin: the first two have swapped their places, colors or textures."""
    a, b = things[:2]
    fields = ("x", "y") if kind == "place" else (kind,)
    new_a = dataclasses.replace(a, **{f: getattr(b, f) for f in fields})
    new_b = dataclasses.replace(b, **{f: getattr(a, f) for f in fields})
    return [new_a, new_b, *things[2:]]


def _draw_captions(rng, things, groups) -> list[grammar.Caption]:
    """Draws captions that are true of a scene."""
    table = grammar.SceneTable([things])
    captions = []
    while len(captions) < SCENE_CAPTIONS:
        meaning = _draw_meaning(rng, things, groups)
        # A meaning may be untrue: "two red things" if a third thing is red as well.
        if grammar.scenes_where_true(meaning, table)[0]:
            captions.append(grammar.word_caption(meaning, rng))
    return captions


def _draw_meaning(rng, things, groups) -> Meaning:
    """Draws a meaning about some of the groups of a scene."""
    order = [groups[i] for i in rng.permutation(len(groups))]
    mentioned = order[: 1 if rng.random() < 0.1 else rng.integers(2, len(groups) + 1)]
    phrases = tuple(_draw_phrase(rng, things, group) for group in mentioned)
    relation = None
    if len(phrases) == 2 and all(p.count == 1 for p in phrases) and rng.random() < 0.7:
        relation = grammar.relation_between(things[mentioned[0][0]], things[mentioned[1][0]])
    return Meaning(phrases, relation)


def _draw_phrase(rng, things, group, always=()) -> Phrase:
    """Draws a phrase about a group of equal things; it mentions the attributes in `always`."""
    thing = things[group[0]]
    probability = {"size": 0.3, "texture": 0.8 if thing.texture != "plain" else 0.3, "color": 0.9, "shape": 0.9}
    attributes = {a: getattr(thing, a) for a in grammar.ATTRIBUTES if rng.random() < probability[a] or a in always}
    if not attributes:
        attributes = {"color": thing.color}
    return Phrase(attributes, len(group), tuple(group))


def _draw_twin_meaning(rng, things, kind) -> Meaning:
    """Draws a meaning about the two swapped things: a relation (always for swapped places), or a list."""
    first, second = (0, 1) if rng.random() < 0.5 else (1, 0)
    phrases = tuple(_draw_phrase(rng, things, (index,), MENTIONED[kind]) for index in (first, second))
    relation = None
    if kind == "place" or rng.random() < 0.5:
        relation = grammar.relation_between(things[first], things[second])
    return Meaning(phrases, relation)


def _mirror(meaning: Meaning, things: list[Thing], kind: str) -> Meaning:
    """Returns the meaning of the same caption about the twin.

    Attributes are those of the twin's things. For swapped places, the two phrases are exchanged and the relation stays,
    so that the words are the same.
    """
    phrases = tuple(
        dataclasses.replace(p, attributes={a: getattr(things[p.things[0]], a) for a in p.attributes})
        for p in meaning.phrases
    )
    return Meaning(phrases[::-1] if kind == "place" else phrases, meaning.relation)


def _to_json(scene: dict) -> dict:
    """Returns the ground truth of a scene as JSON values."""
    things = [{**grammar.to_json(t), "box": _compute_box(t)} for t in scene["things"]]
    return {"things": things, "captions": [grammar.to_json(c) for c in scene["captions"]], "twin": scene["twin"]}


def _compute_box(thing: Thing) -> list[float]:
    """Returns the corners x0, y0, x1, y1 of the box around a thing and its outline, in image widths, clipped to the
    image."""
    r, line = thing.radius * REACH[thing.shape], OUTLINE / SCENE_PIXELS
    left = right = top = bottom = r + line
    if thing.shape == "triangle":  # see _draw_mask
        left = right = r + 3**0.5 * line
        top, bottom = 0.866 * r + 2 * line, 0.866 * r + line
    corners = (thing.x - left, thing.y - top, thing.x + right, thing.y + bottom)
    return [round(min(max(v, 0.0), 1.0), 4) for v in corners]


def draw_scene(things: list[Thing], rng: np.random.Generator) -> bytes:
    """Draws a scene on a background cluttered with muted marks: JPEG bytes, SCENE_PIXELS square."""
    image = _draw_background(rng)
    for thing in things:
        shade = rng.integers(-18, 19, size=3)
        color = tuple(int(np.clip(c + s, 0, 255)) for c, s in zip(COLOR_VALUES[thing.color], shade, strict=True))
        image.paste(OUTLINE_COLOR, mask=_draw_mask(thing, grow=OUTLINE))
        image.paste(_draw_texture(thing, color, image.size), mask=_draw_mask(thing))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92, subsampling=0)
    return out.getvalue()


def _draw_background(rng) -> Image.Image:
    """Draws a background: a gray gradient with noise and some muted lines."""
    base = rng.integers(118, 139)
    slope = np.linspace(-1, 1, SCENE_PIXELS)
    tilt = rng.uniform(-12, 12, size=2)
    gray = base + tilt[0] * slope[:, None] + tilt[1] * slope[None, :] + rng.normal(0, 3, (SCENE_PIXELS, SCENE_PIXELS))
    image = Image.fromarray(np.clip(gray, 0, 255).astype(np.uint8)).convert("RGB")
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 10)):
        x, y, dx, dy = rng.uniform(0, SCENE_PIXELS, 2).tolist() + rng.uniform(-16, 16, 2).tolist()
        muted = tuple(int(v) for v in rng.integers(100, 157) + rng.integers(-15, 16, size=3))
        pen.line((x, y, x + dx, y + dy), fill=muted, width=int(rng.integers(1, 4)))
    return image


def _draw_mask(thing: Thing, grow: float = 0.0) -> Image.Image:
    """Draws the fraction of each pixel that a thing covers, after its border is moved outwards by `grow` pixels."""
    # Drawn larger and averaged, because Pillow's shapes include their last pixel, which would favor long borders.
    scale = 8
    mask = Image.new("L", (SCENE_PIXELS * scale, SCENE_PIXELS * scale))
    pen = ImageDraw.Draw(mask)
    x, y, grow = thing.x * mask.width, thing.y * mask.width, grow * scale
    r = thing.radius * REACH[thing.shape] * mask.width
    near, far = 0.25 * r + grow, r + grow
    if thing.shape == "circle":
        pen.ellipse((x - far, y - far, x + far, y + far), fill=255)
    elif thing.shape == "square":
        pen.rectangle((x - far, y - far, x + far, y + far), fill=255)
    elif thing.shape == "triangle":  # equilateral: moving the border by one pixel moves a corner by two
        half, bottom = r + 3**0.5 * grow, y + 0.866 * r + grow
        pen.polygon([(x, y - 0.866 * r - 2 * grow), (x + half, bottom), (x - half, bottom)], fill=255)
    else:
        pen.rectangle((x - far, y - near, x + far, y + near), fill=255)
        pen.rectangle((x - near, y - far, x + near, y + far), fill=255)
    return mask.reduce(scale)


def _draw_texture(thing: Thing, color, size) -> Image.Image:
    """Draws the texture of a thing over a whole image of `size`."""
    light, dark = (tuple(min(max(c + sign * CONTRAST, 0), 255) for c in color) for sign in (1, -1))
    if thing.texture == "plain":
        return Image.new("RGB", size, color)
    image = Image.new("RGB", size, light)
    pen = ImageDraw.Draw(image)
    for position in range(0, max(size), 8):
        upright = thing.texture == "striped"
        pen.rectangle(
            (position, 0, position + 3, size[1]) if upright else (0, position, size[0], position + 3), fill=dark
        )
    return image
