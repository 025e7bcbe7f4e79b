"""Explanations of pairs: their terms by word, boxes, and the statistics that training logs."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mefn_jax.reports import explain, explanation


def test_explain_captions_merges_wordpieces_into_words(loaded):
    model, params, split, images, texts = loaded
    captions = explanation.evenly_spaced(5, split.num_captions)
    explanations = explanation.explain_captions(model, params, split, images, texts, captions)
    for x, caption in zip(explanations, captions, strict=True):
        image = split.caption_image[caption]
        one = jax.tree.map(lambda f, k=image: f[k], images), jax.tree.map(lambda f, k=caption: f[k], texts)
        terms = jax.device_get(model.model.explain(params, *one))
        assert x.caption == split.record(image)["captions"][caption - split.caption_offsets[image]]
        assert "".join(x.words) == x.caption.lower().replace(" ", "")
        assert x.H.shape == (len(x.boxes), len(x.words)) == (len(x.region_weights), len(x.word_weights))
        assert x.values["MFE"] == pytest.approx(x.H.sum(), rel=1e-5)
        assert x.values["score"] == pytest.approx(float(terms["score"]), rel=1e-5)
        for weights in (x.region_weights, x.word_weights):
            assert weights.sum() == pytest.approx(1, rel=1e-5)
        np.testing.assert_allclose(x.attention.sum(0), 1, rtol=1e-5)
        # The weights of a word's pieces are added, their attention is averaged.
        _, word_of_piece = model.tokenizer.words(x.caption)
        for k in range(len(x.words)):
            pieces = np.flatnonzero(word_of_piece == k)
            np.testing.assert_allclose(x.word_weights[k], terms["word_weights"][pieces].sum(), rtol=1e-5)
            np.testing.assert_allclose(x.attention[:, k], terms["word_attention"][:, pieces].mean(1), rtol=1e-5)


def test_explain_captions_uses_boxes_of_each_image(loaded):
    model, params, split, images, texts = loaded
    boxes = np.random.default_rng(0).random((split.num_images, images.mask.shape[1], 4))
    captions = [0, split.num_captions - 1]
    explanations = explanation.explain_captions(
        model, params, split, images, texts, captions, explain.RegionSources(boxes, None)
    )
    for x, image in zip(explanations, (0, split.num_images - 1), strict=True):
        np.testing.assert_array_equal(x.boxes, boxes[image])


def test_explain_captions_skips_captions_without_words(loaded):
    model, params, split, images, texts = loaded
    texts = texts.replace(mask=texts.mask & (np.arange(split.num_captions) > 0)[:, None])
    assert explanation.explain_captions(model, params, split, images, texts, [0]) == []
    explanations = explanation.explain_captions(model, params, split, images, texts, [0, 7])
    assert [x.caption for x in explanations] == [split.all_captions()[7]]


def test_evenly_spaced_returns_middles_of_equal_parts():
    assert explanation.evenly_spaced(4, 40) == [5, 15, 25, 35]
    assert explanation.evenly_spaced(3, 2) == [0, 1]
    assert explanation.evenly_spaced(0, 10) == []


def test_training_logs_mean_statistics_and_draws_pairs(mefn_run, loaded):
    model, params, split, _images, _texts = loaded
    line = json.loads((mefn_run / "metrics.jsonl").read_text().splitlines()[-1])
    part = split.first_images(model.config.eval.val_images)
    means = explanation.mean_statistics(model, params, part, *model.encode(params, part))
    assert {name: line[f"pairs.{name}"] for name in means} == pytest.approx(means, rel=1e-4)
    assert 0 < means["region_entropy"] <= 1
    assert 0 < means["word_entropy"] <= 1
    events = b"".join(path.read_bytes() for path in (mefn_run / "tensorboard").iterdir())
    assert b"explained/0" in events
    assert events.count(b"\x89PNG") == 2


def test_score_terms_sum_to_score(loaded):
    """Of MEFN, of its ablations without a branch or the evidence, with a hubness correction, and of another matcher."""
    model, params, split, images, texts = loaded
    (pair,) = explanation.explain_captions(model, params, split, images, texts, [3])
    terms = explanation.score_terms(pair)
    assert list(terms) == ["global", "local", "entropy"]
    assert sum(terms.values()) == pytest.approx(pair.values["score"], abs=1e-5)
    assert terms["entropy"] == pytest.approx(-pair.values["evidence_weight"] * pair.values["mean_entropy"], abs=1e-6)
    shares = [explanation.term_share(terms, name) for name in terms]
    assert sum(shares) == pytest.approx(1)
    assert shares[2] == pytest.approx(abs(terms["entropy"]) / sum(map(abs, terms.values())))
    values = {"local": 0.4, "global": 0.7, "evidence": 0.0, "image_hub_offset": 0.0, "text_hub_offset": 0.0}
    for gate, expected in ((0.0, {"global": 0.7}), (1.0, {"local": 0.4})):
        x = dataclasses.replace(pair, values=values | {"gate": gate, "score": sum(expected.values())})
        assert explanation.score_terms(x) == expected
    offsets = {"image_hub_offset": 0.1, "text_hub_offset": 0.05}
    x = dataclasses.replace(pair, H=None, values={"score": 0.2} | offsets)
    assert explanation.score_terms(x) == pytest.approx({"matcher": 0.35, "hubness": -0.15})
    assert explanation.term_share({}, "entropy") == 0
