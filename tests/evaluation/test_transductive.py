"""Corrections of scores at test time, against loops over queries written from their papers' formulas."""

import numpy as np
import pytest
from reference_ranking import rank_in_tiles

from mefn_jax import metrics
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation import transductive
from mefn_jax.evaluation.transductive import METHODS, Bank, parse_transductive

IMAGES, CAPTIONS = 6, 9
rng = np.random.default_rng(0)
SCORES = rng.normal(size=(IMAGES, CAPTIONS))
BANK = Bank(rng.normal(size=(5, CAPTIONS)), rng.normal(size=(IMAGES, 7)))


def order(scores):
    return np.argsort(-scores, kind="stable")


def test_csls_equals_naive_loops():
    i2t, t2i = METHODS["csls"].compute(SCORES, None, 3)
    for i in range(IMAGES):
        for c in range(CAPTIONS):
            near_image = np.mean(sorted(SCORES[i])[-3:])
            near_caption = np.mean(sorted(SCORES[:, c])[-3:])
            expected = 2 * SCORES[i, c] - near_image - near_caption
            assert i2t[i, c] == t2i[i, c] == pytest.approx(expected, abs=1e-12)


def test_csls_takes_all_of_a_small_gallery():
    expected = 2 * SCORES - SCORES.mean(1, keepdims=True) - SCORES.mean(0, keepdims=True)
    np.testing.assert_allclose(METHODS["csls"].compute(SCORES, None, 100)[0], expected)


def test_dual_softmax_ranks_as_product_of_softmaxes():
    i2t, t2i = METHODS["dual_softmax"].compute(SCORES, None, 2.0)
    e = np.exp(2.0 * SCORES)
    product = (e / e.sum(0)) * (e / e.sum(1, keepdims=True))
    for i in range(IMAGES):
        np.testing.assert_array_equal(order(i2t[i]), order(product[i]))
    for c in range(CAPTIONS):
        np.testing.assert_array_equal(order(t2i[:, c]), order(product[:, c]))


def test_querybank_ranks_as_dynamic_inverted_softmax():
    i2t, t2i = METHODS["querybank"].compute(SCORES, BANK, 2.0)
    changed = 0
    for queries, bank, corrected in ((SCORES, BANK.images, i2t), (SCORES.T, BANK.captions.T, t2i.T)):
        activated = {int(np.argmax(b)) for b in bank}
        for q, row in enumerate(queries):
            expected = row
            if int(np.argmax(row)) in activated:
                expected = np.array([np.exp(2 * s) / sum(np.exp(2 * b[g]) for b in bank) for g, s in enumerate(row)])
                changed += 1
            np.testing.assert_array_equal(order(corrected[q]), order(expected))
    assert 0 < changed < IMAGES + CAPTIONS


def test_correct_scores_counts_each_direction_in_its_own_matrix(loaded):
    model, params, split, images, texts = loaded
    chosen = {"csls": 5.0, "dual_softmax": 10.0, "querybank": 10.0}
    results = transductive.correct_scores(model, params, images, texts, split, split, chosen)
    scores = transductive.score_all(model, params, images, texts)
    for name, strength in chosen.items():
        i2t, t2i = METHODS[name].compute(scores, Bank(scores, scores), strength)  # the split is its own bank
        counts = [rank_in_tiles(m, split.caption_image, 7, 11).counts[1][side] for side, m in enumerate((i2t, t2i))]
        expected = metrics.retrieval_metrics(*counts, split.caption_image)
        assert results[name]["strength"] == strength
        assert results[name]["rsum"] == pytest.approx(expected["rsum"])
        assert results[name]["t2i"] == pytest.approx(expected["t2i"])
        assert results[name]["i2t"] == pytest.approx(expected["i2t"])


def test_parse_transductive_gives_strengths():
    assert parse_transductive("") == {}
    assert parse_transductive("csls,querybank:50") == {"csls": 10, "querybank": 50.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cslss", "did you mean 'csls'"),
        ("csls,csls", "give csls once"),
        ("csls:x", "a number of at least 1"),
        ("querybank:0.5", "a number of at least 1"),
    ],
)
def test_parse_transductive_names_what_is_wrong(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_transductive(text)
