"""Concepts and their co-occurrences against counting loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.matching import concepts
from mefn_jax.matching.concepts import Occurrences


def random_occurrences(seed, images=9, captions=20, words=4, clusters=3) -> Occurrences:
    rng = np.random.default_rng(seed)
    image_index = np.sort(np.concatenate([np.arange(images), rng.integers(images, size=captions - images)]))
    marks = [(rng.random(shape) < 0.5).astype(np.float32) for shape in ((images, clusters), (captions, words))]
    return Occurrences(*marks, image_index)


def naive_edges(units) -> np.ndarray:
    """Edges of concepts from units, pairs of the marks `(K,)` of one side and of the other."""
    rows, columns = len(units[0][0]), len(units[0][1])
    edges = np.zeros((rows, columns))
    for k in range(rows):
        for m in range(columns):
            both = sum(1 for a, y in units if a[k] and y[m])
            if both >= concepts.MIN_COUNT:
                alone = sum(1 for a, _ in units if a[k]) * sum(1 for _, y in units if y[m])
                edges[k, m] = max(0.0, np.log(both * len(units) / alone))
    return edges


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_edges_equal_counting_loops(seed):
    o = random_occurrences(seed)
    for marks in (o.images, o.captions):
        found = concepts.weigh_edges(*concepts.count_within(marks))
        np.testing.assert_allclose(found, naive_edges([(x, x) for x in marks]), atol=1e-6)
    pairs = [(o.images[i], y) for i, y in zip(o.image_index, o.captions, strict=True)]
    np.testing.assert_allclose(concepts.weigh_edges(*concepts.count_across(o)), naive_edges(pairs), atol=1e-6)
    neighbours = np.array([np.random.default_rng(k).permutation(np.delete(np.arange(9), k))[:2] for k in range(9)])
    pairs = [
        (o.images[i], o.captions[c])
        for i in range(9)
        for n in neighbours[i]
        for c in np.flatnonzero(o.image_index == n)
    ]
    found = concepts.weigh_edges(*concepts.count_across(o, neighbours))
    np.testing.assert_allclose(found, naive_edges(pairs), atol=1e-6)


def test_weigh_edges_by_hand():
    """Of 40 units, 10 have the first concept of each side together, 4 the second ones, none the third ones."""
    together = np.array([[10, 10, 0], [0, 4, 0], [0, 0, 0]], np.float32)
    weights = concepts.weigh_edges(together, 40, np.array([10, 4, 0]), np.array([10, 40, 0]))
    expected = np.zeros((3, 3))
    expected[0, 0] = np.log(10 * 40 / (10 * 10))  # the second concept is in every unit, and tells nothing
    np.testing.assert_allclose(weights, expected, atol=1e-12)  # 4 units are too few


def test_keep_strongest_normalizes_rows():
    found = concepts.keep_strongest(np.array([[3.0, 1, 0], [0, 0, 0], [2, 2, 2]]), 2)
    np.testing.assert_allclose(found, [[0.75, 0.25, 0], [0, 0, 0], [0.5, 0.5, 0]])


def test_neighbour_edge_connects_what_no_pair_has_together():
    """Cluster 0 and word 0 meet only through a neighbor's caption."""
    images = np.tile(np.array([[1, 0], [0, 1]], np.float32), (6, 1))
    captions = np.tile(np.array([[0, 1], [1, 0]], np.float32), (6, 1))  # the cluster's own images have word 1
    o = Occurrences(images, captions, np.arange(12))
    neighbours = np.arange(12)[:, None] ^ 1
    assert concepts.weigh_edges(*concepts.count_across(o))[0, 0] == 0
    assert concepts.weigh_edges(*concepts.count_across(o, neighbours))[0, 0] == pytest.approx(np.log(2))


def test_nearest_images_are_the_most_similar_others():
    rng = np.random.default_rng(0)
    image_index = np.repeat(np.arange(7), [1, 2, 3, 1, 5, 2, 6])  # a caption counts less among more
    images, texts = rng.normal(size=(7, 3)), 1 + rng.normal(size=(20, 3))
    means = np.array([texts[image_index == k].mean(0) for k in range(7)])
    sides = [x - x.mean(0) for x in (images, means)]
    sides = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in sides]
    for k, found in enumerate(concepts.nearest_images(images, texts, image_index, 3)):
        similarity = {other: sum(x[k] @ x[other] for x in sides) for other in range(7) if other != k}
        assert found.tolist() == sorted(similarity, key=similarity.get, reverse=True)[:3]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_no_image_is_its_own_neighbour_among_few_or_equal_ones(number):
    """With as many neighbors as images, or more, and where the image itself is no nearer than the others."""
    vectors = np.ones((number, 2))
    found = concepts.nearest_images(vectors, vectors, np.arange(number), 3)
    assert found.shape == (number, number - 1)
    assert not np.any(found == np.arange(number)[:, None])
    marks = np.ones((number, 4), np.float32)
    weights = concepts.weigh_edges(*concepts.count_across(Occurrences(marks, marks, np.arange(number)), found))
    assert not np.any(weights)  # too few units, and a concept of every unit tells nothing


def test_cluster_regions_finds_separate_directions():
    rng = np.random.default_rng(0)
    centers = np.linalg.qr(rng.normal(size=(6, 6)))[0][:4]
    kind = np.arange(80) % 4
    regions = centers[kind] + 0.05 * rng.normal(size=(80, 6))
    regions = (regions / np.linalg.norm(regions, axis=1, keepdims=True)).astype(np.float32)
    centroids = concepts.cluster_regions(regions, 4, seed=0)
    clusters = concepts.nearest_concept(regions, centroids)
    assert len({(a, b) for a, b in zip(kind, clusters, strict=True)}) == 4
    # At the end, each centroid is the unit mean of its regions.
    for k, centroid in enumerate(centroids):
        mean = regions[clusters == k].mean(0)
        np.testing.assert_allclose(centroid, mean / np.linalg.norm(mean), atol=1e-5)
    assert len(concepts.cluster_regions(regions[:1].repeat(5, 0), 4, seed=0)) == 1  # no more than there are


def test_words_are_the_most_frequent_of_enough_captions():
    captions = ["A dog, a dog!"] * 6 + ["the dog runs"] * 5 + ["one cat"] * 4
    assert concepts.frequent_words(captions, 9) == ["dog", "a", "runs", "the"]
    assert concepts.frequent_words(captions, 2) == ["dog", "a"]
    marks = concepts.mark_words(["THE dog.", "nothing"], ["dog", "a", "the"], 4)
    np.testing.assert_array_equal(marks, [[1, 0, 1, 0], [0, 0, 0, 0]])


def test_mark_clusters_leaves_out_masked_regions():
    fragments = np.eye(3, dtype=np.float32)[[[0, 1], [2, 2]]]
    marks = concepts.mark_clusters(fragments, np.array([[1, 0], [1, 1]], bool), np.eye(3, dtype=np.float32), 4)
    np.testing.assert_array_equal(marks, [[1, 0, 0, 0], [0, 0, 1, 0]])
