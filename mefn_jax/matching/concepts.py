"""Concepts of a training split and how often they occur together (docs/method.md, section 17; SFE).

Textual concepts are frequent words of captions, visual concepts are clusters of regions. Everything is counted once,
from training items alone, before the first step. NumPy; I images, C captions, R regions, D dimensions, K concepts.
"""

import collections
import dataclasses

import numpy as np

from mefn_jax.data.tokenizer import normalize_caption

MIN_COUNT = 5  # captions that a word must be in, and units that two concepts must share to be joined by an edge
MAX_CLUSTERED = 200_000  # regions that are clustered, at most
MAX_SEEDED = 20_000  # regions among which the first centroids are drawn, at most
ROUNDS = 20  # of k-means
BLOCK = 4096  # rows of a matrix product at a time


@dataclasses.dataclass(frozen=True)
class Occurrences:
    """Which items have which concepts.

    Attributes:
        images: float32 `(I, K)`, 1 where a region of the image is of the visual concept.
        captions: float32 `(C, K)`, 1 where the caption has the word.
        image_index: int `(C,)`, the image of each caption.
    """

    images: np.ndarray
    captions: np.ndarray
    image_index: np.ndarray


def frequent_words(captions: list[str], number: int) -> list[str]:
    """Returns the words, at most `number`, that are in most captions, the most frequent first; each is in at least
    MIN_COUNT of them."""
    counts = collections.Counter(word for caption in captions for word in set(split_words(caption)))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, count in ranked[:number] if count >= MIN_COUNT]


def split_words(caption: str) -> list[str]:
    """Returns the words of a caption in lower case, without punctuation."""
    return normalize_caption(caption, lower_case=True, punctuation="drop").split()


def mark_words(captions: list[str], words: list[str], number: int) -> np.ndarray:
    """Returns which captions have which words, float32 `(C, number)`, with empty columns for missing words."""
    column = {word: k for k, word in enumerate(words)}
    marks = np.zeros((len(captions), number), np.float32)
    for row, caption in zip(marks, captions, strict=True):
        row[[column[word] for word in split_words(caption) if word in column]] = 1
    return marks


def cluster_regions(regions: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Clusters unit vectors `(R, D)` by spherical k-means. Returns at most `number` unit centroids, `(K, D)`."""
    rng = np.random.default_rng(seed)
    if len(regions) > MAX_CLUSTERED:
        regions = regions[np.sort(rng.choice(len(regions), MAX_CLUSTERED, replace=False))]
    centroids = _draw_centroids(regions, number, rng)
    for _ in range(ROUNDS):
        cluster = nearest_concept(regions, centroids)
        sums = np.zeros(centroids.shape)
        np.add.at(sums, cluster, regions)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        # A cluster without regions, or whose regions cancel, keeps its centroid.
        centroids = np.where(lengths > 1e-6, sums / np.maximum(lengths, 1e-6), centroids).astype(np.float32)
    return centroids


def _draw_centroids(regions: np.ndarray, number: int, rng) -> np.ndarray:
    """Draws at most `number` different regions as first centroids: each with a probability proportional to its distance
    `1 - cosine` from those drawn before (k-means++)."""
    pool = regions[np.sort(rng.choice(len(regions), min(len(regions), MAX_SEEDED), replace=False))]
    drawn, distance = [pool[rng.integers(len(pool))]], np.full(len(pool), np.inf)
    while len(drawn) < number:
        distance = np.minimum(distance, np.maximum(1 - pool.astype(np.float64) @ drawn[-1], 0))
        distance[distance < 1e-6] = 0  # equal to a centroid
        if not distance.any():
            break
        drawn.append(pool[rng.choice(len(pool), p=distance / distance.sum())])
    return np.stack(drawn)


def nearest_concept(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Returns the centroid with the largest cosine for each of the vectors `(R, D)`, int `(R,)`."""
    blocks = [np.argmax(vectors[k : k + BLOCK] @ centroids.T, 1) for k in range(0, len(vectors), BLOCK)]
    return np.concatenate(blocks)


def mark_clusters(fragments: np.ndarray, mask: np.ndarray, centroids: np.ndarray, number: int) -> np.ndarray:
    """Returns which images have a region of which cluster, float32 `(I, number)`, for regions `(I, N, D)` with their
    mask `(I, N)`."""
    marks = np.zeros((len(mask), number), np.float32)
    marks[np.nonzero(mask)[0], nearest_concept(fragments[mask], centroids)] = 1
    return marks


def nearest_images(images: np.ndarray, texts: np.ndarray, image_index: np.ndarray, number: int) -> np.ndarray:
    """Returns the most similar other images of each image, int `(I, number)`, or all others if these are fewer, by the
    sum of two cosines: of the pooled embeddings `images (I, D)`, and of the mean embeddings of their captions, `texts
    (C, D)`; both are centered."""
    captions = np.zeros(images.shape)
    np.add.at(captions, image_index, texts)
    counts = np.bincount(image_index, minlength=len(images))[:, None]
    sides = [_center(images), _center(captions / np.maximum(counts, 1))]
    vectors = np.concatenate(sides, 1).astype(np.float32)
    neighbours = []
    for start in range(0, len(vectors), BLOCK):
        similarity = vectors[start : start + BLOCK] @ vectors.T
        rows = np.arange(len(similarity))
        similarity[rows, start + rows] = -np.inf  # never itself
        neighbours.append(np.argsort(-similarity, axis=1, kind="stable")[:, : min(number, len(vectors) - 1)])
    return np.concatenate(neighbours)


def _center(vectors: np.ndarray) -> np.ndarray:
    """Returns the unit vectors of the differences from the mean; zero where there is none."""
    centered = vectors - vectors.mean(0)
    return centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-6)


def count_within(marks: np.ndarray) -> tuple:
    """Returns the arguments of `weigh_edges` for concepts of one kind: a unit is one item, `marks (items, K)`."""
    together = marks.T @ marks
    return together, len(marks), np.diagonal(together), np.diagonal(together)


def count_across(occurrences: Occurrences, neighbours: np.ndarray | None = None) -> tuple:
    """Returns the arguments of `weigh_edges` for visual concepts (rows) and words (columns). A unit is a true pair, or
    with `neighbours (I, n)` an image and a caption of one of its neighbors."""
    images, captions = occurrences.images, occurrences.captions
    words, number = np.zeros((len(images), captions.shape[1]), np.float32), np.zeros(len(images), np.float32)
    np.add.at(words, occurrences.image_index, captions)
    np.add.at(number, occurrences.image_index, 1)
    if neighbours is not None:
        words, number = words[neighbours].sum(1), number[neighbours].sum(1)
    return images.T @ words, number.sum(), images.T @ number, words.sum(0)


def weigh_edges(together: np.ndarray, units: float, row_counts, column_counts) -> np.ndarray:
    """Returns the weights of edges: the positive pointwise mutual information, 0 below MIN_COUNT common units.

    `together (K, K)` counts the units that have both concepts; `row_counts` and `column_counts (K,)`, those that have
    one of them.
    """
    expected = np.outer(row_counts, column_counts).astype(np.float64) / max(units, 1)
    known = together >= MIN_COUNT  # then both are in some unit, and a positive number is expected
    ratio = np.divide(together, expected, out=np.ones_like(expected), where=known)
    return np.maximum(np.log(ratio), 0.0)


def keep_strongest(weights: np.ndarray, number: int) -> np.ndarray:
    """Returns the rows of edges `(K, K)` with their `number` largest weights, divided by their sum; float32. A row
    without edges stays zero."""
    order = np.argsort(-weights, axis=1, kind="stable")[:, :number]
    kept = np.zeros(weights.shape)
    np.put_along_axis(kept, order, np.take_along_axis(weights, order, 1), 1)
    total = kept.sum(1, keepdims=True)
    return (kept / np.where(total > 0, total, 1)).astype(np.float32)
