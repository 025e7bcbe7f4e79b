"""Ground truth of the drawn scenes in evaluation: twin accuracy and ambiguous captions.

Twins are two scenes that differ only in which object has which attribute or place, with captions of the same words
(minimal pairs, as in Winoground). Ambiguous captions are true of several scenes of the split.
"""

import dataclasses

import numpy as np

from mefn_jax.data.scenes import grammar
from mefn_jax.data.split import Split
from mefn_jax.scoring.listed import score_listed_pairs


@dataclasses.dataclass(frozen=True)
class Twins:
    """Captions that tell a scene from its twin: true of the scene, untrue of the twin. Q captions.

    Attributes:
        captions: int `(Q,)`, positions in the split.
        own, other: int `(Q,)`, the scene that each caption describes, and its twin.
        kinds: str `(Q,)`, the property that was swapped: color, texture or place.
        shared: the share of all captions of the split that are ambiguous, in [0, 1].
    """

    captions: np.ndarray
    own: np.ndarray
    other: np.ndarray
    kinds: np.ndarray
    shared: float


def find_twins(split: Split) -> Twins | None:
    """Returns the twins of a split of drawn scenes, or None for photographs."""
    scenes = [split.record(k)["scene"] for k in range(split.num_images)] if split.record(0)["scene"] else None
    if scenes is None:
        return None
    table = grammar.SceneTable([[_parse_thing(t) for t in scene["things"]] for scene in scenes])
    rows, ambiguous = [], 0
    for image, scene in enumerate(scenes):
        for number, caption in enumerate(scene["captions"]):
            is_true = grammar.scenes_where_true(grammar.meaning_from_json(caption["meaning"]), table)
            ambiguous += np.sum(is_true) > 1
            twin = scene["twin"]
            if twin and twin["index"] < split.num_images and not is_true[twin["index"]]:
                rows.append((split.caption_offsets[image] + number, image, twin["index"], twin["kind"]))
    columns = [np.array(c) for c in zip(*rows, strict=True)] if rows else [np.array([], int)] * 4
    return Twins(*columns, shared=float(ambiguous / split.num_captions))


def _parse_thing(fields: dict) -> grammar.Thing:
    return grammar.thing_from_json({k: v for k, v in fields.items() if k != "box"})


def twin_accuracy(twins: Twins, scores) -> dict[str, float]:
    """Returns how often a caption scores higher with its scene than with the twin (docs/method.md, Eq. 62).

    In percent, a tie counting one half: `{"all", "color", "texture", "place"}`, without kinds that do not occur.
    `scores` is a `tiles.Scores`.
    """
    own, other = (score_listed_pairs(scores, x, twins.captions) for x in (twins.own, twins.other))
    correct = (own > other) + 0.5 * (own == other)
    kinds = {"all": np.ones(len(correct), bool)} | {k: twins.kinds == k for k in sorted(set(twins.kinds))}
    return {kind: 100.0 * float(np.mean(correct[is_kind])) for kind, is_kind in kinds.items()}
