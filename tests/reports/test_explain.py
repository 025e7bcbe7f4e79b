"""What is explained of pairs: by words, over the photograph; its pictures, its commands, and the library."""

import dataclasses
import io
import json
import re
import textwrap

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import mefn_jax
from configs import precomputed, shapes
from mefn_jax.data import from_config
from mefn_jax.encoders.grids import grid_boxes
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation import evaluator
from mefn_jax.reports import explain, explanation, figures
from mefn_jax.reports.explanation import Explanation
from mefn_jax.training import loop

CAPTION = "a red circle is left of a big blue square"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A trained run whose evaluations draw pairs."""
    config = shapes.get_config("smoke")
    with config.unlocked():
        config.train.steps, config.train.eval_every, config.eval.explained_pairs = 2, 2, 2
    found = tmp_path_factory.mktemp("run")
    loop.train(config, found)
    return found


@pytest.fixture(scope="module")
def loaded(workdir):
    """The trained evaluator and its parameters, a split and its features."""
    model, params, _ = evaluator.load_checkpoint(workdir, "latest")
    split = from_config.open_dataset(model.config).split("val")
    return model, params, split, *model.encode(params, split)


def test_parts_by_word_are_those_by_piece(loaded):
    model, params, split, images, texts = loaded
    captions = explanation.evenly_spaced(5, split.num_captions)
    found = explanation.explain_captions(model, params, split, images, texts, captions)
    for x, caption in zip(found, captions, strict=True):
        image = split.caption_image[caption]
        one = jax.tree.map(lambda f, k=image: f[k], images), jax.tree.map(lambda f, k=caption: f[k], texts)
        parts = jax.device_get(model.model.explain(params, *one))
        assert x.caption == split.record(image)["captions"][caption - split.caption_offsets[image]]
        assert "".join(x.words) == x.caption.lower().replace(" ", "")
        assert x.H.shape == (len(x.boxes), len(x.words)) == (len(x.region_weights), len(x.word_weights))
        assert x.values["MFE"] == pytest.approx(x.H.sum(), rel=1e-5)
        assert x.values["score"] == pytest.approx(float(parts["score"]), rel=1e-5)
        for shares in (x.region_weights, x.word_weights):
            assert shares.sum() == pytest.approx(1, rel=1e-5)
        np.testing.assert_allclose(x.attention.sum(0), 1, rtol=1e-5)
        # A word's pieces: their weights are added, their attention is averaged.
        _, of = model.tokenizer.words(x.caption)
        for k in range(len(x.words)):
            pieces = np.flatnonzero(of == k)
            np.testing.assert_allclose(x.word_weights[k], parts["word_weights"][pieces].sum(), rtol=1e-5)
            np.testing.assert_allclose(x.attention[:, k], parts["word_attention"][:, pieces].mean(1), rtol=1e-5)


def test_places_are_those_of_each_image(loaded):
    model, params, split, images, texts = loaded
    boxes = np.random.default_rng(0).random((split.num_images, images.mask.shape[1], 4))
    captions = [0, split.num_captions - 1]
    found = explanation.explain_captions(
        model, params, split, images, texts, captions, explain.RegionSources(boxes, None)
    )
    for x, image in zip(found, (0, split.num_images - 1), strict=True):
        np.testing.assert_array_equal(x.boxes, boxes[image])


def test_captions_of_no_word_are_left_out(loaded):
    model, params, split, images, texts = loaded
    texts = texts.replace(mask=texts.mask & (np.arange(split.num_captions) > 0)[:, None])
    assert explanation.explain_captions(model, params, split, images, texts, [0]) == []
    found = explanation.explain_captions(model, params, split, images, texts, [0, 7])
    assert [x.caption for x in found] == [split.all_captions()[7]]


def test_captions_to_explain_are_the_middles_of_equal_parts():
    assert explanation.evenly_spaced(4, 40) == [5, 15, 25, 35]
    assert explanation.evenly_spaced(3, 2) == [0, 1]
    assert explanation.evenly_spaced(0, 10) == []


def test_training_logs_means_and_draws_pairs(workdir, loaded):
    model, params, split, _images, _texts = loaded
    line = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    part = split.first_images(model.config.eval.val_images)
    means = explanation.mean_statistics(model, params, part, *model.encode(params, part))
    assert {name: line[f"pairs.{name}"] for name in means} == pytest.approx(means, rel=1e-4)
    assert 0 < means["region_entropy"] <= 1
    assert 0 < means["word_entropy"] <= 1
    events = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    assert b"explained/0" in events
    assert events.count(b"\x89PNG") == 2


def drawn(x: Explanation) -> Image.Image:
    return Image.open(io.BytesIO(figures.to_png(figures.draw_explanation(x))))


def made(words, regions=9, side=(300, 360), boxes=True):
    """An explanation of nothing."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.dirichlet(np.ones(shape[0]), shape[1:]).T  # noqa: E731
    boxes = np.concatenate([grid_boxes(3, 3), grid_boxes(7, 8)])[:regions] if boxes else None
    photo = rng.integers(0, 256, (*side, 3), np.uint8) if side else None
    shares = draw(regions), draw(len(words)), draw(regions, len(words))
    values = {"score": 0.5, "local": 0.4, "global": 0.6, "gate": 0.5, "MFE": 3.0, "lambda": 9.0, "kappa": 4.0}
    return Explanation(
        " ".join(words), "test: image 1", words, photo, boxes, rng.random((regions, len(words))), *shares, values
    )


@pytest.mark.parametrize(
    "x",
    [
        made(["dog"]),
        made([f"word{k}" for k in range(70)], regions=65),
        made(
            ["Überraschung", "日本語", "русский", "donaudampfschifffahrtsgesellschaftskapitän", ".", "🙂", "$x_", "<b>"]
        ),
        made(["a", "boat"], side=(400, 200)),
        made(["a", "boat"], side=None),
        made(["a", "boat"], side=None, boxes=False),
        made(["a", "the"]),
    ],
    ids=["one word", "70 words", "scripts", "portrait", "no photograph", "no boxes", "no content word"],
)
def test_pictures_of_all_kinds(x):
    picture = drawn(x)
    assert 1100 < picture.width < 1350
    assert 600 < picture.height < 2000
    found = figures.draw_explanation(x)
    titles = [axes.get_title() for axes in found.axes]
    panels = [figures.shorten(x.words[k]) for k in figures.content_words(x)]
    assert [title for title in titles if title in panels] == panels
    assert np.asarray(picture).std() > 10
    assert figures.to_pixels(found).dtype == np.uint8


def test_words_that_are_drawn():
    x = made(["a", "dog", "runs", "on", "the", "grass", "."])
    assert [x.words[k] for k in figures.content_words(x)] == ["dog", "runs", "grass"]
    many = made([f"w{k}" for k in range(40)])
    shown = figures.content_words(many)
    assert len(shown) == 12
    assert shown == sorted(shown)
    assert min(many.word_weights[shown]) >= max(np.delete(many.word_weights, shown))


def test_shares_over_the_photograph():
    """A pixel has the densities of all boxes that it lies in; boxes of even shares that fill the image give 1."""
    boxes = np.concatenate([grid_boxes(3, 3), grid_boxes(2, 2)])
    np.testing.assert_allclose(
        figures.attention_heatmap(np.r_[np.full(9, 0.5 / 9), np.full(4, 0.5 / 4)], boxes), 1, rtol=1e-6
    )
    one = figures.attention_heatmap(np.eye(13)[4], boxes)  # the middle cell
    third = figures.MAP_PIXELS // 3
    assert one[third : 2 * third, third : 2 * third].min() == one.max() == 9
    assert one.mean() == pytest.approx(1)


def test_the_commands(workdir, command, tmp_path):
    text = command("eval.py", f"--workdir={workdir}", "--explain=2", "--split=val").stdout
    for k in (1, 2):
        assert f"wrote {workdir}/eval/val/explain/{k:02}.png" in text
        assert Image.open(workdir / "eval" / "val" / "explain" / f"{k:02}.png").width > 1000
    Image.new("RGB", (40, 90), (200, 30, 30)).save(tmp_path / "a photo.jpg")
    asked = f"--explain_image={tmp_path / 'a photo.jpg'}", f"--explain_caption={CAPTION}"
    text = command("eval.py", f"--workdir={workdir}", *asked).stdout
    assert f"wrote {workdir}/eval/explain/a_photo.png" in text
    assert CAPTION in text


def test_what_cannot_be_explained_is_said(workdir, tmp_path):
    with pytest.raises(DataError, match=r"--explain_image=.*nothing\.jpg: No such file"):
        explain.draw_image_file(workdir, "latest", str(tmp_path / "nothing.jpg"), CAPTION)
    with pytest.raises(ConfigError, match="without words"):
        explain.draw_image_file(workdir, "latest", str(tmp_path / "nothing.jpg"), " ")
    with pytest.raises(ConfigError, match="this model takes images"):
        explain.draw_captions(workdir, "", "val", "latest", 1, boxes="boxes.npy")
    with pytest.raises(ConfigError, match=r"give a \.png file"):
        explain.draw_image_file(workdir, "latest", "x.jpg", CAPTION, out="x.jpg")
    model, params, _ = evaluator.load_checkpoint(workdir, "latest")
    no_map = dataclasses.replace(model.model, matcher=object())
    with pytest.raises(ConfigError, match="has no entropy map"):
        explanation.explain_features(dataclasses.replace(model, model=no_map), params, None, None)


def test_boxes_and_photographs_of_precomputed_regions(tmp_path):
    path = tmp_path / "boxes.npy"
    np.save(path, np.tile(grid_boxes(3, 3), (4, 1, 1)))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (80, 50), (10, 200, 10)).save(tmp_path / "photos" / "17.jpg")
    places = explain.read_region_sources(str(path), str(tmp_path / "photos"), 4)
    x = places.attach(made(["a", "dog"], side=None, boxes=False), 2, "17")
    np.testing.assert_array_equal(x.boxes, grid_boxes(3, 3))
    assert x.photo.shape == (225, 360, 3)
    with pytest.raises(DataError, match=r"no 18, 18\.jpg"):
        places.attach(x, 2, "18")
    with pytest.raises(DataError, match="9 an image, but the model has 5"):
        places.attach(made(["a"], regions=5), 0, "17")
    with pytest.raises(DataError, match=r"expected \(5, regions, 4\), found \(4, 9, 4\)"):
        explain.read_region_sources(str(path), "", 5)
    np.save(path, 3 * np.ones((5, 9, 4)))
    with pytest.raises(DataError, match="from 0 to 1"):
        explain.read_region_sources(str(path), "", 5)
    with pytest.raises(ConfigError, match="no such folder"):
        explain.read_region_sources("", str(tmp_path / "none"), 5)
    assert explain.read_region_sources("", "", 5) is None
    config = precomputed.get_config()
    grid = config.image.regions.grid
    fake = evaluator.Evaluator(None, None, config, None)
    np.testing.assert_array_equal(explanation.find_region_boxes(fake, grid**2), grid_boxes(grid, grid))
    assert explanation.find_region_boxes(fake, 36) is None


def test_the_library(workdir, loaded, tmp_path):
    model, params, split, images, texts = loaded
    found = mefn_jax.load(workdir, "latest")
    files = [split.record(k)["image"] for k in range(3)]
    (tmp_path / "one.png").write_bytes(files[0])
    captions = split.all_captions()[:7]
    encoded = found.encode_images([tmp_path / "one.png", *files[1:]]), found.encode_texts(captions)
    expected = model.scores(params, images, texts)(slice(0, 3), slice(0, 7))
    np.testing.assert_allclose(found.score(*encoded), expected, atol=1e-5)
    x = found.explain(tmp_path / "one.png", captions[0])
    assert x.values["score"] == pytest.approx(expected[0, 0], abs=1e-5)
    assert x.caption == captions[0]
    with pytest.raises(DataError, match="give images"):
        found.encode_images([])
    for captions in ([], "a red circle"):
        with pytest.raises(DataError, match="give a list of captions"):
            found.encode_texts(captions)
    with pytest.raises(DataError, match=r"two\.png: No such file"):
        found.encode_images([tmp_path / "two.png"])


def test_readmes_example(workdir, loaded, tmp_path, monkeypatch, capsys):
    """README's lines of Python, where its run and photographs are."""
    code = re.search(r"    import mefn_jax\n.*?\n\n(?=## )", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "shapes").symlink_to(workdir)
    for k, name in enumerate(("one.jpg", "two.jpg")):
        (tmp_path / name).write_bytes(loaded[2].record(k)["image"])
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(code), {})
    said = capsys.readouterr().out
    assert said.count("[") >= 4
    assert "'circle'" in said
