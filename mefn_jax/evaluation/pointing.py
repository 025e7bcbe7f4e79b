"""Pointing accuracy on the drawn scenes: is a word's attention highest inside what it names? (The pointing game, Zhang
et al. 2016: the highest point of a map against the box of the thing.)"""

import dataclasses

import jax
import numpy as np

from mefn_jax.data.split import Split
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.features import Features
from mefn_jax.model import region_boxes


@dataclasses.dataclass(frozen=True)
class NamedWord:
    """A wordpiece that names one or several things of its scene.

    Attributes:
        caption, image: positions in the split.
        piece: its place among the caption's wordpieces.
        boxes: `(K, 4)`, x0, y0, x1, y1 of the things, in image widths and heights.
    """

    caption: int
    image: int
    piece: int
    boxes: np.ndarray


def named_words(split: Split, tokenizer) -> list[NamedWord]:
    """The wordpieces of a split of drawn scenes that say what a thing is: its size, texture, colour or shape."""
    found = []
    for image in range(split.num_images):
        record = split.record(image)
        things = np.array([thing["box"] for thing in record["scene"]["things"]])
        numbers = tokenizer.encode(record["captions"])[2][:, 1:]  # without [CLS]
        for k, caption in enumerate(record["scene"]["captions"]):
            for phrase, (start, stop) in zip(caption["meaning"]["phrases"], caption["spans"], strict=True):
                inside = (numbers[k] > start) & (numbers[k] < stop)  # the first word is an article or a number
                boxes = things[list(phrase["things"])]
                found += [
                    NamedWord(int(split.caption_offsets[image]) + k, image, int(j), boxes)
                    for j in np.flatnonzero(inside)
                ]
    return found


def pointing_accuracy(evaluator: Evaluator, params, images: Features, texts: Features, split: Split) -> dict | None:
    """`{"all", "chance"}` in percent: how often the region that a word attends to most has its centre in a box of what
    the word names, and how often a region drawn at random would. `all` is None for a matcher without `explain`; None
    where regions have no place.

    `images`, `texts` are the split's encoded images and captions.
    """
    boxes = region_boxes(evaluator.config, evaluator.model)
    if boxes is None:
        return None
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    named = named_words(split, evaluator.tokenizer)
    inside = np.stack([_inside(centres, word.boxes) for word in named])  # (W, N)
    result = {"all": None, "chance": 100.0 * float(np.mean(inside))}
    if hasattr(evaluator.model.matcher, "explain"):
        highest = _most_attended(evaluator, params, images, texts, split.caption_image)  # (C, M)
        hits = [row[highest[word.caption, word.piece]] for row, word in zip(inside, named, strict=True)]
        result["all"] = 100.0 * float(np.mean(hits))
    return result


def _inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Which points `(N, 2)` lie in any of the boxes `(K, 4)`."""
    within = (points[:, None] >= boxes[None, :, :2]) & (points[:, None] <= boxes[None, :, 2:])
    return within.all(-1).any(-1)


def _most_attended(evaluator: Evaluator, params, images: Features, texts: Features, owner) -> np.ndarray:
    """For each wordpiece of each caption, the region of its own image with the highest attention: int `(C, M)`."""

    @jax.jit
    def attention(params, images, texts):
        parts = jax.vmap(evaluator.model.explain, (None, 0, 0))(params, images, texts)
        return parts["word_attention"].argmax(1)

    size, found = evaluator.config.eval.batch_size, []
    for start in range(0, len(owner), size):
        # The last batch goes back, so that all have one shape.
        chosen = np.arange(max(0, min(start, len(owner) - size)), min(start + size, len(owner)))
        pair = (jax.tree.map(lambda x, at=at: x[at], f) for f, at in ((images, owner[chosen]), (texts, chosen)))
        found.append(np.asarray(attention(params, *pair))[start - chosen[0] :])
    return np.concatenate(found)
