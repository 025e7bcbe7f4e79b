"""Metrics with many positives: against the package of their authors, if it is installed, and against loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.benchmarks.readers.coco import CocoGallery
from mefn_jax.benchmarks.tasks import many_positives as task
from mefn_jax.data.split import Split
from mefn_jax.errors import TrainingError
from mefn_jax.scoring.ranking import rank


def loop_metrics(scores, positives):
    """R@1, mAP@R and R-Precision by loops over a ranking in which a negative comes before a positive of equal score."""
    result = []
    for query, own in positives.items():
        own = set(own.tolist())
        order = sorted(range(scores.shape[1]), key=lambda k: (-scores[query, k], k in own))
        precisions, found = [], 0
        for place, k in enumerate(order[: len(own)], 1):
            found += k in own
            precisions.append(found / place if k in own else 0.0)
        result.append((order[0] in own, np.mean(precisions), found / len(own)))
    return np.mean(result, 0)


def draw_positives(rng, queries, candidates):
    chosen = rng.permutation(queries)[: max(1, queries // 2)]
    result = {int(q): rng.permutation(candidates)[: rng.integers(1, candidates)] for q in chosen}
    first = int(chosen[0])
    result[first] = np.append(result[first], -1)  # a positive that is no candidate
    return result


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.booleans())
def test_metrics_with_many_positives_equal_loops(seed, tied):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (9, 14)).astype(np.float32) if tied else rng.normal(size=(9, 14)).astype(np.float32)
    positives = draw_positives(rng, 9, 14)
    counts = task.count_stronger(scores, positives)
    own = [
        np.mean([n.min() + 1 <= 1 for n in counts]),
        np.mean([task.average_precision_at_r(n) for n in counts]),
        np.mean([task.r_precision(n) for n in counts]),
    ]
    np.testing.assert_allclose(own, loop_metrics(scores, positives), atol=1e-12)


def make_gallery(seed, images=20):
    """A gallery with five captions an image, and random positives of half of the queries."""
    rng = np.random.default_rng(seed)
    caption_image = np.repeat(np.arange(images), 5)
    split = Split("gallery", None, np.arange(images), np.zeros(images + 1, int))
    sides = draw_positives(rng, images, 5 * images), draw_positives(rng, 5 * images, images)
    return CocoGallery(split, [f"caption {k}" for k in range(5 * images)], caption_image, *sides, True)


def table_of(measures):
    """The value and the chance of every measure, by name."""
    values = {m.name: float(m.compute(np.ones((1, len(m.arrays["sums"]))))[0]) for m in measures}
    return values, {m.name: m.chance for m in measures}


def all_measures(scores, gallery):
    ranking = rank(lambda rows, columns: scores[rows, columns], gallery.caption_image, (1, 5))
    own = [
        m for n, counts in ranking.counts.items() for m in task.measure_own_recalls(counts, gallery.caption_image, n)
    ]
    return task.measure_positives(scores, gallery) + own


@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_equal_those_of_eccv_caption(seed):
    """On scores without ties, whose order does not depend on a sort."""
    package = pytest.importorskip("eccv_caption")
    gallery = make_gallery(seed)
    scores = np.random.default_rng(seed).normal(size=(20, 100)).astype(np.float32)
    scores[gallery.caption_image, np.arange(100)] += 1.5
    theirs = package.Metrics()
    # Among these ids, -1 is none, so that the package counts a positive that is never found.
    theirs.eccv_gts = {side: {q: of.tolist() for q, of in getattr(gallery, side).items()} for side in ("i2t", "t2i")}
    theirs.cxc_gts = theirs.eccv_gts
    own = {int(k): np.flatnonzero(gallery.caption_image == k).tolist() for k in range(20)}
    theirs.coco_gts = {"i2t": own, "t2i": {c: [int(i)] for c, i in enumerate(gallery.caption_image)}}
    theirs.coco_ids = np.arange(100)
    i2t = {k: np.argsort(-scores[k]).tolist() for k in range(20)}
    t2i = {c: np.argsort(-scores[:, c]).tolist() for c in range(100)}
    names = ("eccv_r1", "cxc_recalls", "eccv_rprecision", "eccv_map_at_r", "coco_1k_recalls", "coco_5k_recalls")
    expected = theirs.compute_all_metrics(i2t, t2i, target_metrics=names, Ks=(1, 5, 10))
    values, _ = table_of(all_measures(scores, gallery))
    assert all(expected["eccv_r1"][side] == expected["cxc_r1"][side] for side in ("i2t", "t2i"))
    for side, name in task.DIRECTION_NAMES.items():
        pairs = {f"{name}.r{k}": f"cxc_r{k}" for k in (1, 5, 10)}
        pairs |= {f"{name}.map_at_r": "eccv_map_at_r", f"{name}.r_precision": "eccv_rprecision"}
        pairs |= {f"COCO {n}, {name}.r{k}": f"coco_{n.lower()}_r{k}" for n in ("5K", "1K") for k in (1, 5, 10)}
        for own_name, their_name in pairs.items():
            assert values[own_name] == pytest.approx(100 * expected[their_name][side], abs=1e-6), own_name


def test_constant_scores_are_at_most_chance_and_random_ones_near_it():
    gallery = make_gallery(3)
    values, chances = table_of(all_measures(np.zeros((20, 100), np.float32), gallery))
    assert all(values[name] <= chances[name] for name in values)
    assert not any(values[name] for name in values if "1K" not in name and name.endswith(".r1"))
    rng = np.random.default_rng(0)
    tables = [table_of(all_measures(rng.normal(size=(20, 100)).astype(np.float32), gallery))[0] for _ in range(200)]
    for name, chance in chances.items():
        sample = [table[name] for table in tables]
        assert np.mean(sample) == pytest.approx(chance, abs=4 * np.std(sample) / len(sample) ** 0.5), name


def test_scores_that_are_no_numbers_are_refused():
    scores = np.zeros((20, 100), np.float32)
    scores[3, 7] = np.nan
    with pytest.raises(TrainingError, match="image 3 and caption 7 is nan"):
        all_measures(scores, make_gallery(0))
