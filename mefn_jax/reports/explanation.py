"""Explanations of single pairs, ready to be drawn: the matcher's terms by words, over the photograph.

MEFN and its ablations have entropies and weights; of another matcher with `attention`, that alone is explained.

Terms are computed for wordpieces and merged into the words of the caption. B pairs, N regions, M wordpieces, W words.
"""

import dataclasses

import jax
import numpy as np

from mefn_jax.data import images as image_files
from mefn_jax.data.split import Split
from mefn_jax.encoders.grids import grid_boxes
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.features import Features
from mefn_jax.model import region_boxes

PAIRS = 16  # pairs whose mean statistics training logs
PHOTO_PIXELS = 360  # side of a photograph in a figure
TERM_NAMES = {  # of `score_terms`, as pages and pictures show them
    "global": "global similarity",
    "local": "local attention",
    "entropy": "entropy (MFE)",
    "matcher": "matcher",
    "hubness": "hubness",
}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One image and one caption with the terms that a matcher computes for them, as NumPy arrays (docs/method.md).

    Attributes:
        caption: the caption as it was given.
        title: which image and caption these are.
        words: W strings. Over the pieces of a word, H and weights are added and attention is averaged.
        photo: uint8 `(H, W, 3)`, resized and cropped as the model sees it; None for precomputed regions.
        boxes: `(N, 4)`, x0, y0, x1, y1 as fractions of the photo's width and height; None if they are not known.
        attention: `(N, W)`, each word's distribution over the regions; columns sum to 1 (Eq. 19).
        values: scalars by name: score and the two hubness offsets; of MEFN also local, global, evidence (its term in
            the score), mean_entropy, MFE, and the learned scalars of the matcher.
        H: the entropy map `(N, W)` in nats (section 3); this and the weights are None for a matcher without entropies.
        region_weights, word_weights: `(N,)` and `(W,)`, each with sum 1 (Eqs. 17, 18).
        photo_title: the title of the photo in a figure.
    """

    caption: str
    title: str
    words: list[str]
    photo: np.ndarray | None
    boxes: np.ndarray | None
    attention: np.ndarray
    values: dict[str, float]
    H: np.ndarray | None = None
    region_weights: np.ndarray | None = None
    word_weights: np.ndarray | None = None
    photo_title: str = "as the model sees it"


def score_terms(x: Explanation) -> dict[str, float]:
    """Returns the terms by name whose sum is the score (docs/method.md, Eqs. 25 and 34). Of MEFN they are the global
    and the local score with their weights, and minus the weighted entropy, the evidence; of any other matcher its whole
    score. Terms that a model does not have are left out."""
    v = x.values
    offsets = v.get("image_hub_offset", 0.0) + v.get("text_hub_offset", 0.0)
    if x.H is None:
        terms = {"matcher": v["score"] + offsets}
    else:
        terms = {"global": (1 - v["gate"]) * v["global"], "local": v["gate"] * v["local"], "entropy": v["evidence"]}
        has_part = {"global": v["gate"] < 1, "local": v["gate"] > 0, "entropy": "evidence_weight" in v}
        terms = {name: value for name, value in terms.items() if has_part[name]}
    return terms | ({"hubness": -offsets} if offsets else {})


def term_share(terms: dict[str, float], name: str) -> float:
    """Returns the share of a term of `score_terms` in the sum of the sizes of all, in [0, 1]."""
    total = sum(map(abs, terms.values()))
    return abs(terms.get(name, 0.0)) / total if total else 0.0


def describe_pair(x: Explanation, uri: str) -> dict:
    """Returns an explained pair for the page: its words with the share of the largest weight and a hint, the terms of
    its score with their shares, and its picture."""
    weights = np.zeros(len(x.words)) if x.word_weights is None else x.word_weights
    hints = ["" if x.word_weights is None else f"weight {weight:.3f}" for weight in weights]
    shares = (weights / max(weights.max(initial=0.0), 1e-9)).tolist()
    terms = score_terms(x)
    named = [(TERM_NAMES[name], value, term_share(terms, name)) for name, value in terms.items()]
    words = list(zip(x.words, shares, hints, strict=True))
    return {"caption": x.caption, "words": words, "terms": named, "score": x.values["score"], "uri": uri}


def can_explain(evaluator: Evaluator) -> bool:
    """Returns whether the matcher can be explained: whether it has `attention`, or an `explain` like MEFN's."""
    return evaluator.model.has_entropies or evaluator.model.has_attention


def check_can_explain(evaluator: Evaluator) -> None:
    """Raises ConfigError unless the matcher can be explained."""
    if not can_explain(evaluator):
        raise ConfigError(
            f"model={evaluator.config.model} has no attention to explain; it compares pooled embeddings alone"
        )


def mean_statistics(evaluator: Evaluator, params, split: Split, images: Features, texts: Features) -> dict[str, float]:
    """Returns means over PAIRS evenly spaced captions of a split with their own images; for a matcher with entropies.

    They are `local` and `global` (scores), `MFE` (nats), `mean_entropy` (in [0, 1]), `region_entropy` and
    `word_entropy` (in [0, 1], over the regions and words that exist). `images`, `texts`: all of the split, encoded.
    """
    captions = evenly_spaced(PAIRS, split.num_captions)
    image_index = split.caption_image[captions]
    pairs = (_take_rows(x, rows) for x, rows in ((images, image_index), (texts, captions)))
    terms = explain_features(evaluator, params, *pairs)
    means = {name: float(terms[name].mean()) for name in ("local", "global", "MFE", "mean_entropy")}
    for kind in ("region", "word"):
        means[f"{kind}_entropy"] = float(terms[f"{kind}_entropy"][terms[f"{kind}_mask"]].mean())
    return means


def explain_captions(
    evaluator: Evaluator, params, split: Split, images: Features, texts: Features, captions, region_sources=None
) -> list[Explanation]:
    """Returns explanations of captions of a split, given by position, each with its own image.

    `images`, `texts`: all of the split, encoded. `region_sources`: for precomputed regions, their boxes and photographs
    (`explain.RegionSources`). Captions of which the tokenizer keeps no word are left out. Raises ConfigError for a
    matcher without attention.
    """
    check_can_explain(evaluator)
    captions = [k for k in captions if texts.mask[k].any()]
    if not captions:
        return []
    image_index = split.caption_image[captions]
    pairs = (_take_rows(x, rows) for x, rows in ((images, image_index), (texts, captions)))
    terms = explain_features(evaluator, params, *pairs)
    explanations, boxes = [], find_region_boxes(evaluator, images.mask.shape[1])
    for k, (caption, image) in enumerate(zip(captions, image_index, strict=True)):
        record = split.record(image)
        number = caption - split.caption_offsets[image]
        title = f"{split.name}: image {record['image_id']}, caption {number + 1} of {len(record['captions'])}"
        photo = None if "regions" in record else display_photo(evaluator, record["image"], record["image_id"])
        pair_terms = jax.tree.map(lambda x, k=k: x[k], terms)
        explanation = build_explanation(evaluator, record["captions"][number], title, photo, boxes, pair_terms)
        explanations.append(
            region_sources.attach(explanation, image, record["image_id"]) if region_sources else explanation
        )
    return explanations


def explain_image(evaluator: Evaluator, params, data: bytes, name: str, caption: str, texts: Features) -> Explanation:
    """Returns the explanation of an image file, given by its bytes, and a caption, whose Features are `texts`.

    Raises DataError naming the image if it cannot be decoded, and ConfigError for a matcher without attention.
    """
    pixels = image_files.decode(data, image_files.resize_from_config(evaluator.config.image), name)[None]
    images = evaluator.encode_pixels(params, np.repeat(pixels, evaluator.mesh.size, 0), 1)  # one row for each device
    terms = explain_features(evaluator, params, images, texts)
    boxes = find_region_boxes(evaluator, images.mask.shape[1])
    return build_explanation(
        evaluator, caption, name, display_photo(evaluator, data, name), boxes, jax.tree.map(lambda x: x[0], terms)
    )


def explain_features(evaluator: Evaluator, params, images: Features, texts: Features) -> dict:
    """Returns the terms of pairs (see `Model.explain`), image k with text k, and the masks of regions and words.

    The arrays are NumPy's, `(B, ...)`; the masks are `region_mask (B, N)` and `word_mask (B, M)`. Raises ConfigError
    for a matcher without attention.
    """
    check_can_explain(evaluator)
    terms = jax.device_get(evaluator.explain(params, images, texts))
    return terms | {"region_mask": images.mask, "word_mask": texts.mask}


def build_explanation(evaluator: Evaluator, caption: str, title: str, photo, boxes, terms: dict) -> Explanation:
    """Returns the explanation of one pair from its terms: existing regions only, and words instead of wordpieces."""
    words, word_of_piece = merge_wordpieces(evaluator, caption, int(terms["word_mask"].sum()))
    sums = (word_of_piece[:, None] == np.arange(len(words))).astype(np.float32)  # (M, W), adds the pieces of a word
    region_mask, word_mask = terms["region_mask"], terms["word_mask"]
    select = lambda name: terms[name][region_mask][:, word_mask]  # (N, M)  # noqa: E731
    scalars = {name: float(value) for name, value in terms.items() if np.ndim(value) == 0}
    explanation = Explanation(
        caption, title, words, photo, boxes, select("word_attention") @ (sums / sums.sum(0)), scalars
    )
    if not evaluator.model.has_entropies:
        return explanation
    return dataclasses.replace(
        explanation,
        H=select("H") @ sums,
        region_weights=terms["region_weights"][region_mask],
        word_weights=terms["word_weights"][word_mask] @ sums,
    )


def merge_wordpieces(evaluator: Evaluator, caption: str, pieces: int) -> tuple[list[str], np.ndarray]:
    """Returns the words of a caption that the model has read, and the word of each of its `pieces`, int `(M,)`.

    If our tokenizer gives another number of wordpieces, as for text that was cached with another tokenizer, each piece
    is a word with a number as its name.
    """
    words, word_of_piece = evaluator.tokenizer.words(caption)
    if len(word_of_piece) == pieces:
        return words, word_of_piece
    return [f"word {k + 1}" for k in range(pieces)], np.arange(pieces)


def find_region_boxes(evaluator: Evaluator, regions: int) -> np.ndarray | None:
    """Returns the boxes of the regions `(N, 4)`, or None if they are not known."""
    boxes, side = region_boxes(evaluator.config, evaluator.model), evaluator.config.image.regions.grid
    if boxes is None and side and side * side == regions:
        return grid_boxes(side, side)
    return boxes


def display_photo(evaluator: Evaluator, data: bytes, name: str) -> np.ndarray:
    """Returns a photograph resized and cropped as for the model, but at the size of figures."""
    resize = image_files.resize_from_config(evaluator.config.image)
    return image_files.decode(data, dataclasses.replace(resize, size=PHOTO_PIXELS, resample="bicubic"), name)


def evenly_spaced(number: int, captions: int) -> list[int]:
    """Returns `number` evenly spaced caption positions: the middle of each of `number` equal parts of the split."""
    number = min(number, captions)
    return [(2 * k + 1) * captions // (2 * number) for k in range(number)]


def _take_rows(features: Features, rows) -> Features:
    return jax.tree.map(lambda x: x[rows], features)
