"""Drawn scenes: twins, tight boxes, and shapes that a color histogram cannot tell apart."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mefn_jax.data.scenes import draw, grammar


@pytest.fixture(scope="module")
def scenes():
    return list(draw.generate_examples("test", 120, seed=3))


def things(example):
    fields = grammar.Thing.__dataclass_fields__
    return [grammar.Thing(**{k: t[k] for k in fields}) for t in example["scene"]["things"]]


def test_twin_scenes_share_words_but_not_truth(scenes):
    twins = [(e, scenes[e["scene"]["twin"]["index"]]) for e in scenes if e["scene"]["twin"]]
    assert 0.3 < len(twins) / len(scenes) < 0.7
    assert {e["scene"]["twin"]["kind"] for e, _ in twins} == set(draw.TWIN_KINDS)
    for example, twin in twins:
        assert scenes[twin["scene"]["twin"]["index"]] is example
        assert abs(example["scene"]["twin"]["index"] - twin["scene"]["twin"]["index"]) == 1
        table = grammar.SceneTable([things(twin)])
        for caption, twin_caption in zip(example["scene"]["captions"], twin["scene"]["captions"], strict=True):
            assert Counter(caption["text"].split()) == Counter(twin_caption["text"].split())
            assert not grammar.scenes_where_true(grammar.meaning_from_json(caption["meaning"]), table)[0], caption[
                "text"
            ]


def test_twin_pairs_stay_inside_split():
    for number in range(1, 12):
        examples = list(draw.generate_examples("val", number, seed=1))
        assert len(examples) == number
        for example in examples:
            assert example["scene"]["twin"] is None or example["scene"]["twin"]["index"] < number


def pixels_of(things):
    """The scene with these things, always on the same background: float (H, W, 3)."""
    image = Image.open(io.BytesIO(draw.draw_scene(things, np.random.default_rng(0))))
    assert image.format == "JPEG"
    return np.asarray(image.convert("RGB")).astype(float)


def test_boxes_are_tight_around_drawn_things(scenes):
    for example in scenes[:40]:
        for value in example["scene"]["things"]:
            thing = grammar.thing_from_json({k: v for k, v in value.items() if k != "box"})
            covered = np.asarray(draw._draw_mask(thing, grow=draw.OUTLINE)) > 0
            rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
            drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            # Whole pixels reach beyond the box.
            slack = (drawn - np.array(value["box"]) * draw.SCENE_PIXELS) * [-1, -1, 1, 1]
            assert -0.1 < slack.min() <= slack.max() < 1.2, thing
            assert 0 <= min(value["box"]) < max(value["box"]) <= 1


def test_draw_scene_changes_pixels_of_its_things_only(scenes):
    things = [grammar.thing_from_json({k: v for k, v in t.items() if k != "box"}) for t in scenes[0]["scene"]["things"]]
    changed = np.abs(pixels_of(things) - pixels_of([])).max(2) > 60
    covered = np.any([np.asarray(draw._draw_mask(t, grow=draw.OUTLINE)) > 127 for t in things], axis=0)
    assert (changed & covered).sum() > 0.9 * covered.sum()
    assert (changed & ~covered).sum() < 0.05 * covered.sum()


@pytest.mark.parametrize("shape", grammar.SHAPES)
@pytest.mark.parametrize("texture", grammar.TEXTURES)
def test_drawn_shapes_have_equal_area_and_mean_color(shape, texture):
    """Things of one size and color cover equal areas and have, averaged over positions, the same mean color."""
    color = (128, 128, 128)  # far from 0 and 255, so that light and dark are not clipped
    for size, radius in draw.RADIUS.items():
        areas, means = [], []
        for x, y in np.random.default_rng(0).uniform(0.4, 0.6, (100, 2)):
            thing = grammar.Thing(shape, "yellow", size, texture, x, y, radius)
            cover = np.asarray(draw._draw_mask(thing)) / 255  # (H, W)
            colors = np.asarray(draw._draw_texture(thing, color, cover.shape)).astype(float)
            areas.append(cover.sum())
            means.append((colors * cover[..., None]).sum((0, 1)) / cover.sum())
        assert np.mean(areas) == pytest.approx(np.pi * (radius * draw.SCENE_PIXELS) ** 2, rel=0.03)
        np.testing.assert_allclose(np.mean(means, 0), color, atol=6)


def test_things_stand_in_separate_cells(scenes):
    for example in scenes:
        cells = [(int(t["x"] * draw.LATTICE), int(t["y"] * draw.LATTICE)) for t in example["scene"]["things"]]
        assert len(set(cells)) == len(cells)


def test_generate_examples_follows_seed_alone():
    a, b = (list(draw.generate_examples("train", 6, seed=5)) for _ in range(2))
    assert a == b
    assert list(draw.generate_examples("train", 6, seed=6)) != a
    assert next(draw.generate_examples("val", 6, seed=5))["image"] != a[0]["image"]
