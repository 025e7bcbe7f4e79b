"""Ground truth of the drawn scenes in evaluation: twin accuracy, and captions that are true of several scenes."""

import dataclasses

import numpy as np

from mefn_jax.data.scenes import grammar
from mefn_jax.data.split import Split
from mefn_jax.scoring.tiles import TILE_CAPTIONS, TILE_IMAGES


@dataclasses.dataclass(frozen=True)
class Twins:
    """The captions that tell a scene from its twin: true of the one, untrue of the other.

    Attributes:
        captions: int `(Q,)`, positions in the split; own, other: the scene each describes, and its twin.
        kinds: str `(Q,)`, what was swapped: color, texture or place.
        shared: the share of all the split's captions that are true of more than one of its scenes, in [0, 1].
    """

    captions: np.ndarray
    own: np.ndarray
    other: np.ndarray
    kinds: np.ndarray
    shared: float


def find_twins(split: Split) -> Twins | None:
    """The twins of a split of drawn scenes; None for photographs."""
    scenes = [split.record(k)["scene"] for k in range(split.num_images)] if split.record(0)["scene"] else None
    if scenes is None:
        return None
    table = grammar.SceneTable([[_thing(t) for t in scene["things"]] for scene in scenes])
    found, shared = [], 0
    for image, scene in enumerate(scenes):
        for number, caption in enumerate(scene["captions"]):
            true = grammar.scenes_where_true(grammar.meaning_from_json(caption["meaning"]), table)
            shared += np.sum(true) > 1
            twin = scene["twin"]
            if twin and twin["index"] < split.num_images and not true[twin["index"]]:
                found.append((split.caption_offsets[image] + number, image, twin["index"], twin["kind"]))
    columns = [np.array(c) for c in zip(*found, strict=True)] if found else [np.array([], int)] * 4
    return Twins(*columns, shared=float(shared / split.num_captions))


def _thing(value: dict) -> grammar.Thing:
    return grammar.thing_from_json({k: v for k, v in value.items() if k != "box"})


def twin_accuracy(twins: Twins, scores) -> dict[str, float]:
    """How often a caption scores higher with its scene than with the twin, in percent, a tie counting one half.

    `scores` is a `tiled.Scores`. Returns `{"all", "color", "texture", "place"}`, the kinds that occur.
    """
    right = np.empty(len(twins.captions))
    for part in _runs(twins):
        captions, own, other = twins.captions[part], twins.own[part], twins.other[part]
        rows, columns = _range(own, other), _range(captions)
        tile, column = scores(rows, columns), captions - columns.start
        difference = tile[own - rows.start, column] - tile[other - rows.start, column]
        right[part] = (difference > 0) + 0.5 * (difference == 0)
    kinds = {"all": np.ones(len(right), bool)} | {k: twins.kinds == k for k in sorted(set(twins.kinds))}
    return {kind: 100.0 * float(np.mean(right[chosen])) for kind, chosen in kinds.items()}


def _runs(twins: Twins):
    """Cuts the captions into runs that fit a tile: twins are neighbours, and captions follow their images."""
    start = 0
    while start < len(twins.captions):
        stop = start + 1
        while stop < len(twins.captions):
            part = slice(start, stop + 1)
            rows, columns = _range(twins.own[part], twins.other[part]), _range(twins.captions[part])
            if rows.stop - rows.start > TILE_IMAGES or columns.stop - columns.start > TILE_CAPTIONS:
                break
            stop += 1
        yield slice(start, stop)
        start = stop


def _range(*positions) -> slice:
    return slice(int(min(p.min() for p in positions)), int(max(p.max() for p in positions)) + 1)
