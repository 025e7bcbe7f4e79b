"""MATE's losses against loops in float64 and SciPy's entropies, and what is wrong with HECT as it was published."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerical_gradient import check_gradient
from scipy.special import softmax
from scipy.stats import entropy

from mefn_jax import losses

B, D = 8, 5


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def fused_similarity(v, t):
    """A similarity of pairs that is no product of their vectors."""
    return jnp.sum(jnp.tanh(3 * v) * jnp.roll(t, 1, -1), -1) / D


def random_batch(seed, image):
    rng = np.random.default_rng(seed)
    v, t = unit(rng.normal(size=(2, B, D))).astype(np.float32)
    image = np.array(image)
    return v @ t.T, np.asarray(losses.positives_mask(image)), (v, t)


def naive_hardest(scores, positives):
    """The hardest text of each image and the hardest image of each text, None without a negative."""
    rows = [[c for c in range(B) if not positives[r, c]] for r in range(B)]
    texts = [max(negatives, key=lambda c, r=r: scores[r, c]) if negatives else None for r, negatives in enumerate(rows)]
    images = [
        max(negatives, key=lambda c, r=r: scores[c, r]) if negatives else None for r, negatives in enumerate(rows)
    ]
    return texts, images


def naive_hect(scores, positives, embeddings, with_triplet=True):
    v, t = (x.astype(np.float64) for x in embeddings)
    f = lambda a, b: float(np.sum(np.tanh(3 * a) * np.roll(b, 1)) / D)  # noqa: E731
    distance, costs = lambda s: np.sqrt(max(2 - 2 * s, 0)), []
    hardest = naive_hardest(scores, positives)
    for r in range(B):
        for own, mined in ((v, hardest[0][r]), (t, hardest[1][r])):
            if mined is None:
                costs.append(0.0)
                continue
            pair, negative = f(v[r], t[r]), f(v[r], t[mined]) if own is v else f(v[mined], t[r])
            if with_triplet:
                negative = max(negative, max(own[r] @ own[c] for c in range(B) if not positives[r, c]))
            costs.append(0.5 * np.log1p(np.exp((negative - pair) / 0.5)))
            if with_triplet:
                costs[-1] += max(distance(pair) - distance(negative) + 1.0, 0.0)
    return np.mean(costs)


owners = st.lists(st.integers(0, 3), min_size=B, max_size=B)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), owners)
def test_hect_equals_loops_with_gradients(seed, image):
    scores, positives, embeddings = random_batch(seed, image)
    for loss, with_triplet in ((losses.hect, True), (losses.contrast_hardest, False)):
        value, gradient = differentiate(loss)(embeddings, scores, positives)
        assert float(value) == pytest.approx(naive_hect(scores, positives, embeddings, with_triplet), abs=1e-5)
        reference = functools.partial(naive_hect, scores, positives, with_triplet=with_triplet)
        check_gradient(reference, embeddings, gradient, seed)


@functools.cache
def differentiate(loss):
    return jax.jit(
        jax.value_and_grad(lambda embeddings, scores, positives: loss(scores, positives, embeddings, fused_similarity))
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), owners)
def test_mine_hardest_never_chooses_a_positive(seed, image):
    """Views of a pair and other captions of an image are positives; of equal negatives, the first is taken."""
    scores, positives, _ = random_batch(seed, image)
    scores = np.round(scores, 1)  # with ties
    texts, images = naive_hardest(scores, positives)
    for found, expected in zip(losses.mine_hardest(scores, positives), (texts, images), strict=True):
        for r, c in enumerate(expected):
            assert int(found[r]) == (c or 0)
            assert c is None or not positives[r, c]


def test_mine_hardest_passes_no_gradient_and_is_equal_on_eight_devices():
    scores, positives, _ = random_batch(0, np.arange(B) // 2)
    scores = np.round(scores, 1)
    gradient = jax.grad(lambda s: jnp.sum(jnp.arange(float(B))[losses.mine_hardest(s, positives)[0]]))(scores)
    assert not np.any(gradient)
    mesh = jax.make_mesh((8,), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.jit(losses.mine_hardest)(*jax.device_put((scores, positives), rows))
    for one, other in zip(losses.mine_hardest(scores, positives), sharded, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("similarity", [1.0, -1.0, 0.0])
def test_hect_has_finite_gradients_at_extremes(similarity):
    """Fused similarities of 1 for pairs and negatives, and equal items, where distances are 0."""
    v = np.tile(unit(np.ones(D)), (B, 1)).astype(np.float32)

    def total(v, t, s):
        return losses.hect(v @ t.T, np.eye(B, dtype=bool), (v, t), lambda a, b: s * jnp.sum(a * b, -1))

    value, gradients = jax.value_and_grad(total, (0, 1, 2))(v, v, similarity)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(x)) for x in gradients)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 1.0]))
def test_distill_equals_relative_entropies_of_scipy_with_gradients(seed, noise):
    rng = np.random.default_rng(seed)
    scores = rng.uniform(-1, 1, (B, B)).astype(np.float32)
    teacher = (scores + noise * rng.uniform(-1, 1, (B, B))).astype(np.float32)
    p, q = ([softmax(x.astype(float) / 0.07, axis) for axis in (0, 1)] for x in (teacher, scores))
    expected = np.mean([np.mean(entropy(a, b, axis=axis)) for axis, a, b in zip((0, 1), p, q, strict=True)])
    value, gradients = jax.jit(jax.value_and_grad(losses.distill, (0, 1)))(scores, teacher)
    assert float(value) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert float(value) >= -1e-6
    assert not np.any(gradients[1])  # the teacher gets no gradient
    student = [
        (softmax(scores.astype(float) / 0.07, axis) - x) / 0.07 / B / 2 for axis, x in zip((0, 1), p, strict=True)
    ]
    np.testing.assert_allclose(gradients[0], sum(student), atol=1e-5)
    if noise == 0:
        assert np.max(np.abs(gradients[0])) < 1e-6


def test_mate_losses_are_sums_of_their_parts():
    scores, positives, embeddings = random_batch(1, np.arange(B) // 2)
    teacher = np.random.default_rng(0).uniform(-1, 1, (B, B)).astype(np.float32)
    options = {"margin": 0.2, "hardest": 0.5, "anchors": "both", "same_pair": np.eye(B, dtype=bool)}
    inputs = {"embeddings": embeddings, "fused_similarity": fused_similarity, "teacher_scores": teacher}
    sel = losses.sel(scores, positives, None, None, **options)
    fused = [loss(scores, positives, embeddings, fused_similarity) for loss in (losses.hect, losses.contrast_hardest)]
    distill = losses.distill(scores, teacher)
    expected = {
        "sel_hect_distill": sel + fused[0] + 0.5 * distill,
        "sel_hect": sel + fused[0],
        "sel_contrast_distill": sel + fused[1] + 0.5 * distill,
        "sel_distill": sel + 0.5 * distill,
    }
    for name, value in expected.items():
        loss = losses.LOSSES[name]
        given = {key: x for key, x in inputs.items() if key in loss.needs}
        assert float(loss.compute(scores, positives, None, None, **options, **given)) == pytest.approx(float(value))


def published_hect(v, t, pairs):
    """HECT as MATE's authors' code computes it, for `pairs` pairs in two views: unit rows `(2 pairs, D)` of images and
    of texts. Returns what it takes for positives, its hardest negatives, its triplet term and the pairs' distances."""
    rows = np.concatenate([v, t])  # all images, then all texts
    similarity = rows @ rows.T
    positives = [similarity[k, k + pairs] for k in range(pairs)]  # the offset of one view, in a matrix of two
    is_own = np.tile(np.eye(2 * pairs, dtype=bool), (2, 2))  # the row itself and its counterpart, in one view
    hardest = np.argmax(np.where(is_own, 0.0, similarity), 1)
    anchors, positive = np.tile(v, (2, 1)), np.tile(t, (2, 1))  # images alone, twice
    pair_distance = np.linalg.norm(anchors - positive, axis=1)
    to_every_negative = np.linalg.norm(anchors[:, None] - rows[hardest][None], axis=2)  # broadcast: of every row
    negative_distance = np.min(to_every_negative, 1)
    return positives, hardest, np.mean(np.maximum(pair_distance - negative_distance + 1, 0)), pair_distance


def test_published_hect_has_no_negatives_but_ours_has():
    """Its positives are two unrelated images, its hardest negatives are the other view of the same item, and its
    triplet term is a pull on pairs alone. This is why `hect` differs."""
    rng, pairs, width = np.random.default_rng(0), 16, 32
    hidden = rng.normal(size=(pairs, width))
    sides = (hidden + 0.4 * rng.normal(size=hidden.shape) for _ in range(2))
    # Rows 2k and 2k + 1 are views of pair k, which differ less than an image and its text.
    v, t = (unit(np.repeat(side, 2, 0) + 0.1 * rng.normal(size=(2 * pairs, width))) for side in sides)
    positives, hardest, triplet, pair_distance = published_hect(v, t, pairs)
    np.testing.assert_allclose(positives, [v[k] @ v[k + pairs] for k in range(pairs)])
    np.testing.assert_array_equal(hardest, np.arange(4 * pairs) ^ 1)
    assert triplet == pytest.approx(np.mean(pair_distance) + 1, abs=1e-6)
    image = np.arange(2 * pairs) // 2
    mined = losses.mine_hardest(v @ t.T, losses.positives_mask(image))
    assert all(np.all(image[np.asarray(x)] != image) for x in mined)
