"""Two baselines that fine alignment must beat: the caption's words alone, and the image's colours alone.

Both give a `tiled.Scores`. Neither sees what belongs to what, so neither can tell twins apart.
"""

import itertools
from collections import Counter

import numpy as np

from mefn_jax.data import images
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import normalize_caption

BINS = 6  # of each colour channel


def caption_word_overlap(split: Split):
    """No pixels: a caption's words (tf-idf) against the words of the image's other captions. For the caption with
    number k of its image, every image is described by its captions but for its own number k."""
    texts = [split.record(i)["captions"] for i in range(split.num_images)]
    bags = _tfidf([c for captions in texts for c in captions])
    number = np.arange(split.num_captions) - split.caption_offsets[split.caption_image]
    most = int(number.max()) + 1
    described = np.zeros((most, split.num_images, bags.shape[1]), np.float32)  # (K, I, V)
    for k in range(most):
        np.add.at(described[k], split.caption_image[number != k], bags[number != k])
    described, bags = _unit_rows(described), _unit_rows(bags)

    def scores(rows: slice, columns: slice) -> np.ndarray:
        chosen = described[number[columns], rows]  # (columns, rows, V)
        return np.einsum("crv,cv->rc", chosen, bags[columns])

    return scores


def color_histogram(train: Split, split: Split):
    """The image's colour histogram, mapped to words and pairs of words by ridge regression on the training split,
    against the caption's words and pairs of words. Pairs ("red circle") say what belongs to what; colours do not."""
    counts = Counter(t for i in range(train.num_images) for c in train.record(i)["captions"] for t in _terms(c))
    vocabulary = {t: k for k, (t, _) in enumerate(counts.most_common(2000))}
    inputs, targets = _histograms(train), np.zeros((train.num_images, len(vocabulary)), np.float32)
    for i in range(train.num_images):
        for caption in train.record(i)["captions"]:
            targets[i] += _bag(caption, vocabulary)
    frequency = np.maximum((targets > 0).mean(0), 1e-6)
    weight = np.sqrt(np.log(1 / frequency) + 1e-6)  # rare terms say more
    mean_x, mean_y = inputs.mean(0), targets.mean(0)
    x = inputs - mean_x
    ridge = 0.01 * np.trace(x.T @ x) / x.shape[1]
    mapping = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ (targets - mean_y))
    predicted = _unit_rows((_histograms(split) - mean_x) @ mapping * weight)
    bags = _unit_rows(np.stack([_bag(c, vocabulary) for c in split.all_captions()]) * weight)

    def scores(rows: slice, columns: slice) -> np.ndarray:
        return predicted[rows] @ bags[columns].T

    return scores


def _tfidf(texts: list[str]) -> np.ndarray:
    words = [normalize_caption(t, lower_case=True, punctuation="drop").split() for t in texts]
    vocabulary = {w: k for k, w in enumerate(sorted({w for ws in words for w in ws}))}
    counts = np.zeros((len(texts), len(vocabulary)), np.float32)
    for row, ws in zip(counts, words, strict=True):
        for w in ws:
            row[vocabulary[w]] += 1
    return counts * np.log(len(texts) / np.sum(counts > 0, 0))


def _terms(caption: str) -> list[str]:
    words = normalize_caption(caption, lower_case=True, punctuation="drop").split()
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


def _bag(caption: str, vocabulary: dict[str, int]) -> np.ndarray:
    bag = np.zeros(len(vocabulary), np.float32)
    for term in _terms(caption):
        if term in vocabulary:
            bag[vocabulary[term]] += 1
    return bag


def _histograms(split: Split) -> np.ndarray:
    """Square roots of the shares of BINS^3 colours, float32 `(I, BINS^3)`."""
    rows = []
    for i in range(split.num_images):
        record = split.record(i)
        pixels = images.decode(record["image"], images.Resize(64), record["image_id"])
        bins = pixels.reshape(-1, 3).astype(int) * BINS // 256
        flat = (bins[:, 0] * BINS + bins[:, 1]) * BINS + bins[:, 2]
        rows.append(np.bincount(flat, minlength=BINS**3) / len(flat))
    return np.sqrt(np.array(rows, np.float32))


def _unit_rows(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
