"""Pointing game on the drawn scenes: is the attention of a word highest inside the thing that the word names?

After Zhang et al. 2016, who test whether the highest point of a heat map lies in the box of the object; docs/method.md,
Eq. 63.
"""

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
        piece: the wordpiece's position in the caption.
        boxes: `(K, 4)`, x0, y0, x1, y1 of the things, as fractions of the image's width and height.
    """

    caption: int
    image: int
    piece: int
    boxes: np.ndarray


def named_words(split: Split, tokenizer) -> list[NamedWord]:
    """Returns the wordpieces of a split of drawn scenes that describe a thing: its size, texture, color or shape."""
    words = []
    for image in range(split.num_images):
        record = split.record(image)
        things = np.array([thing["box"] for thing in record["scene"]["things"]])
        word_numbers = tokenizer.encode(record["captions"])[2][:, tokenizer.first_word :]
        for k, caption in enumerate(record["scene"]["captions"]):
            for phrase, (start, stop) in zip(caption["meaning"]["phrases"], caption["spans"], strict=True):
                # The first word of a phrase, an article or a number, names nothing.
                in_phrase = (word_numbers[k] > start) & (word_numbers[k] < stop)
                boxes = things[list(phrase["things"])]
                words += [
                    NamedWord(int(split.caption_offsets[image]) + k, image, int(j), boxes)
                    for j in np.flatnonzero(in_phrase)
                ]
    return words


def pointing_accuracy(evaluator: Evaluator, params, images: Features, texts: Features, split: Split) -> dict | None:
    """Returns the result of the pointing game, `{"all", "chance"}` in percent (docs/method.md, Eq. 63).

    `all`: how often the region that a word attends to most has its center in a box of something that the word names;
    None for a matcher without `attention`. `chance`: how often a region drawn at random has. `images`, `texts` are the
    split's encoded images and captions. Returns None if the regions have no known boxes.
    """
    boxes = region_boxes(evaluator.config, evaluator.model)
    if boxes is None:
        return None
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    words = named_words(split, evaluator.tokenizer)
    is_inside = np.stack([_find_inside(centers, word.boxes) for word in words])  # (W, N)
    result = {"all": None, "chance": 100.0 * float(np.mean(is_inside))}
    if evaluator.model.has_attention:
        top_region = _find_most_attended(evaluator, params, images, texts, split.caption_image)  # (C, M)
        hits = [row[top_region[word.caption, word.piece]] for row, word in zip(is_inside, words, strict=True)]
        result["all"] = 100.0 * float(np.mean(hits))
    return result


def _find_inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Returns which points `(N, 2)` lie in any of the boxes `(K, 4)`, bool `(N,)`."""
    within = (points[:, None] >= boxes[None, :, :2]) & (points[:, None] <= boxes[None, :, 2:])
    return within.all(-1).any(-1)


def _find_most_attended(evaluator: Evaluator, params, images: Features, texts: Features, caption_image) -> np.ndarray:
    """Returns the region of its own image that each wordpiece of each caption attends to most, int `(C, M)`."""
    size, top_regions = evaluator.config.eval.batch_size, []
    for start in range(0, len(caption_image), size):
        # The last batch starts earlier and repeats some captions, so that all batches have one shape.
        stop = min(start + size, len(caption_image))
        captions = np.arange(max(0, min(start, len(caption_image) - size)), stop)
        indices = (images, caption_image[captions]), (texts, captions)
        pairs = (jax.tree.map(lambda x, index=index: x[index], features) for features, index in indices)
        top_regions.append(np.asarray(evaluator.attention(params, *pairs)).argmax(1)[start - captions[0] :])
    return np.concatenate(top_regions)
