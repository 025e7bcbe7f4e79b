"""What the matcher makes of single pairs, ready to be drawn: by words instead of wordpieces, over the photograph."""

import dataclasses

import jax
import numpy as np

from mefn_jax.data import images as reading
from mefn_jax.data.split import Split
from mefn_jax.encoders.grids import grid_boxes
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.features import Features
from mefn_jax.model import region_boxes

PAIRS = 16  # whose means training logs
PHOTO = 360  # pixels of a photograph's side in a picture


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One image and one caption, as MEFN sees them (DESIGN.md 3). N regions, W words; NumPy arrays.

    Attributes:
        caption: as it was given; `title`: which image and caption it is.
        words: W strings. A word's pieces are joined: their H and weights are added, their attention is averaged.
        photo: uint8 `(H, W, 3)`, framed as the model sees it; None for precomputed features.
        boxes: `(N, 4)`, x0, y0, x1, y1 in widths and heights of the photo; None where they are not known.
        H: `(N, W)`, nats.
        region_weights, word_weights: `(N,)`, `(W,)`, sums 1.
        attention: `(N, W)`, each word's over the regions, columns sum to 1.
        photo_title: what the photo is.
        values: the scalars by name: score, local, global, gate, MFE, lambda, and kappa and the background's if any.
    """

    caption: str
    title: str
    words: list[str]
    photo: np.ndarray | None
    boxes: np.ndarray | None
    H: np.ndarray
    region_weights: np.ndarray
    word_weights: np.ndarray
    attention: np.ndarray
    values: dict[str, float]
    photo_title: str = "as the model sees it"


def can_explain(evaluator: Evaluator) -> bool:
    """Whether the matcher can be explained."""
    return hasattr(evaluator.model.matcher, "explain")


def check_can_explain(evaluator: Evaluator) -> None:
    """Raises ConfigError unless it can."""
    if not can_explain(evaluator):
        raise ConfigError(f"model={evaluator.config.model} has no entropy map to explain; those of MEFN have")


def mean_statistics(evaluator: Evaluator, params, split: Split, images: Features, texts: Features) -> dict[str, float]:
    """Of PAIRS captions of a split, by `spread`, with their own images, on average: local and global scores, MFE in
    nats, the entropies of the existing regions and words, in [0, 1]."""
    captions = evenly_spaced(PAIRS, split.num_captions)
    owners = split.caption_image[captions]
    parts = explain_features(evaluator, params, *(_rows(x, at) for x, at in ((images, owners), (texts, captions))))
    found = {name: float(parts[name].mean()) for name in ("local", "global", "MFE")}
    for kind, there in (("region", "regions"), ("word", "pieces")):
        found[f"{kind}_entropy"] = float(parts[f"{kind}_entropy"][parts[there]].mean())
    return found


def explain_captions(
    evaluator: Evaluator, params, split: Split, images: Features, texts: Features, captions, places=None
) -> list[Explanation]:
    """Explains captions of a split, by position, each with its own image. `images`, `texts`: all of the split, encoded;
    `places`: where the regions lie and on what, of precomputed ones. Captions of which the tokenizer keeps no word are
    left out. Raises ConfigError for a matcher without `explain`."""
    check_can_explain(evaluator)
    captions = [k for k in captions if texts.mask[k].any()]
    if not captions:
        return []
    owners = split.caption_image[captions]
    parts = explain_features(evaluator, params, *(_rows(x, at) for x, at in ((images, owners), (texts, captions))))
    found, boxes = [], find_region_boxes(evaluator, images.mask.shape[1])
    for k, (caption, image) in enumerate(zip(captions, owners, strict=True)):
        record = split.record(image)
        number = caption - split.caption_offsets[image]
        title = f"{split.name}: image {record['image_id']}, caption {number + 1} of {len(record['captions'])}"
        photo = None if "regions" in record else display_photo(evaluator, record["image"], record["image_id"])
        pair = jax.tree.map(lambda x, k=k: x[k], parts)
        explained = build_explanation(evaluator, record["captions"][number], title, photo, boxes, pair)
        found.append(places.attach(explained, image, record["image_id"]) if places else explained)
    return found


def explain_image(evaluator: Evaluator, params, data: bytes, name: str, caption: str, texts: Features) -> Explanation:
    """Explains an encoded image with a caption, whose Features `texts` are. Raises DataError naming the image,
    ConfigError."""
    pixels = reading.decode(data, reading.resize_from_config(evaluator.config.image), name)[None]
    images = evaluator.encode_pixels(params, np.repeat(pixels, evaluator.mesh.size, 0), 1)  # a row a device
    parts = explain_features(evaluator, params, images, texts)
    boxes = find_region_boxes(evaluator, images.mask.shape[1])
    return build_explanation(
        evaluator, caption, name, display_photo(evaluator, data, name), boxes, jax.tree.map(lambda x: x[0], parts)
    )


def explain_features(evaluator: Evaluator, params, images: Features, texts: Features) -> dict:
    """`MEFN.explain` of pairs, row by row; NumPy arrays `(B, ...)`, with the masks as `regions` and `pieces`."""
    check_can_explain(evaluator)
    return jax.device_get(evaluator.explain(params, images, texts)) | {"regions": images.mask, "pieces": texts.mask}


def build_explanation(evaluator: Evaluator, caption: str, title: str, photo, boxes, parts: dict) -> Explanation:
    """One pair's parts by words and existing regions."""
    words, of = merge_wordpieces(evaluator, caption, int(parts["pieces"].sum()))
    sums = (of[:, None] == np.arange(len(words))).astype(np.float32)  # (M, W)
    there, pieces = parts["regions"], parts["pieces"]
    over = lambda name: parts[name][there][:, pieces]  # (N, M)  # noqa: E731
    scalars = {name: float(value) for name, value in parts.items() if np.ndim(value) == 0}
    return Explanation(
        caption,
        title,
        words,
        photo,
        boxes,
        over("H") @ sums,
        parts["region_weights"][there],
        parts["word_weights"][pieces] @ sums,
        over("word_attention") @ (sums / sums.sum(0)),
        scalars,
    )


def merge_wordpieces(evaluator: Evaluator, caption: str, pieces: int) -> tuple[list[str], np.ndarray]:
    """The words of a caption that the model has read, and which word each of its `pieces` is. Where their number
    is not that of our tokenizer's, as of words that another has cached, they are numbered."""
    words, of = evaluator.tokenizer.words(caption)
    if len(of) == pieces:
        return words, of
    return [f"word {k + 1}" for k in range(pieces)], np.arange(pieces)


def find_region_boxes(evaluator: Evaluator, regions: int) -> np.ndarray | None:
    """Where the regions lie, `(N, 4)`; None where that is not known."""
    boxes, side = region_boxes(evaluator.config, evaluator.model), evaluator.config.image.regions.grid
    if boxes is None and side and side * side == regions:
        return grid_boxes(side, side)
    return boxes


def display_photo(evaluator: Evaluator, data: bytes, name: str) -> np.ndarray:
    """The photograph, cut as the model sees it, large enough to look at."""
    resize = reading.resize_from_config(evaluator.config.image)
    return reading.decode(data, dataclasses.replace(resize, size=PHOTO, resample="bicubic"), name)


def evenly_spaced(number: int, captions: int) -> list[int]:
    """The rule by which captions are chosen to be explained: of so many equal parts of a split, each one's middle."""
    number = min(number, captions)
    return [(2 * k + 1) * captions // (2 * number) for k in range(number)]


def _rows(features: Features, at) -> Features:
    return jax.tree.map(lambda x: x[at], features)
