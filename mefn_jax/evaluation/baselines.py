"""Two baselines that fine alignment must beat: the words of the captions alone, and the colors of the image alone.

Both return a `tiles.Scores`. Neither sees which attribute belongs to which object, so neither can tell twins apart
(docs/method.md, section 13).
"""

import itertools
from collections import Counter

import numpy as np

from mefn_jax.data import images
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import normalize_caption

BINS = 6  # of each color channel


def caption_word_overlap(split: Split):
    """Returns scores that see no pixels: tf-idf cosines of a caption and the other captions of the image.

    A caption that is number k of its image is compared with all captions of each image but its number k.
    """
    texts = [split.record(i)["captions"] for i in range(split.num_images)]
    bags = _compute_tfidf([c for captions in texts for c in captions])
    number = np.arange(split.num_captions) - split.caption_offsets[split.caption_image]
    max_captions = int(number.max()) + 1
    image_bags = np.zeros((max_captions, split.num_images, bags.shape[1]), np.float32)  # (K, I, V)
    for k in range(max_captions):
        np.add.at(image_bags[k], split.caption_image[number != k], bags[number != k])
    image_bags, bags = _normalize_rows(image_bags), _normalize_rows(bags)

    def score_block(rows: slice, columns: slice) -> np.ndarray:
        return np.einsum("crv,cv->rc", image_bags[number[columns], rows], bags[columns])

    return score_block


def color_histogram(train: Split, split: Split):
    """Returns scores that see only colors: cosines of the terms predicted from an image's color histogram and the
    terms of a caption.

    Terms are words and pairs of consecutive words. They are predicted by ridge regression, fitted on the training
    split. Pairs ("red circle") say what belongs to what, but a color histogram does not.
    """
    counts = Counter(t for i in range(train.num_images) for c in train.record(i)["captions"] for t in _extract_terms(c))
    vocabulary = {t: k for k, (t, _) in enumerate(counts.most_common(2000))}
    histograms, targets = _compute_histograms(train), np.zeros((train.num_images, len(vocabulary)), np.float32)
    for i in range(train.num_images):
        for caption in train.record(i)["captions"]:
            targets[i] += _count_terms(caption, vocabulary)
    frequency = np.maximum((targets > 0).mean(0), 1e-6)
    weight = np.sqrt(np.log(1 / frequency) + 1e-6)  # rare terms say more
    mean_x, mean_y = histograms.mean(0), targets.mean(0)
    x = histograms - mean_x
    ridge = 0.01 * np.trace(x.T @ x) / x.shape[1]
    mapping = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ (targets - mean_y))
    predicted = _normalize_rows((_compute_histograms(split) - mean_x) @ mapping * weight)
    bags = _normalize_rows(np.stack([_count_terms(c, vocabulary) for c in split.all_captions()]) * weight)

    def score_block(rows: slice, columns: slice) -> np.ndarray:
        return predicted[rows] @ bags[columns].T

    return score_block


def _compute_tfidf(texts: list[str]) -> np.ndarray:
    words = [normalize_caption(t, lower_case=True, punctuation="drop").split() for t in texts]
    vocabulary = {w: k for k, w in enumerate(sorted({w for ws in words for w in ws}))}
    counts = np.zeros((len(texts), len(vocabulary)), np.float32)
    for row, ws in zip(counts, words, strict=True):
        for w in ws:
            row[vocabulary[w]] += 1
    return counts * np.log(len(texts) / np.sum(counts > 0, 0))


def _extract_terms(caption: str) -> list[str]:
    """Returns the words of a caption and its pairs of consecutive words."""
    words = normalize_caption(caption, lower_case=True, punctuation="drop").split()
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


def _count_terms(caption: str, vocabulary: dict[str, int]) -> np.ndarray:
    bag = np.zeros(len(vocabulary), np.float32)
    for term in _extract_terms(caption):
        if term in vocabulary:
            bag[vocabulary[term]] += 1
    return bag


def _compute_histograms(split: Split) -> np.ndarray:
    """Returns each image's color histogram: square roots of the shares of BINS^3 colors, float32 `(I, BINS^3)`."""
    rows = []
    for i in range(split.num_images):
        record = split.record(i)
        pixels = images.decode(record["image"], images.Resize(64), record["image_id"])
        bins = pixels.reshape(-1, 3).astype(int) * BINS // 256
        flat = (bins[:, 0] * BINS + bins[:, 1]) * BINS + bins[:, 2]
        rows.append(np.bincount(flat, minlength=BINS**3) / len(flat))
    return np.sqrt(np.array(rows, np.float32))


def _normalize_rows(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
