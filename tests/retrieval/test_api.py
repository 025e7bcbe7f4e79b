"""The Python API, `mefn_jax.load`."""

from pathlib import Path

import numpy as np
import pytest

import mefn_jax
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.features import Features


def test_retriever_encodes_scores_and_explains(mefn_run, loaded, tmp_path):
    model, params, split, images, texts = loaded
    retriever = mefn_jax.load(mefn_run, "latest")
    files = [split.record(k)["image"] for k in range(3)]
    (tmp_path / "one.png").write_bytes(files[0])
    captions = split.all_captions()[:7]
    encoded = retriever.encode_images([tmp_path / "one.png", *files[1:]]), retriever.encode_texts(captions)
    expected = model.scores(params, images, texts)(slice(0, 3), slice(0, 7))
    np.testing.assert_allclose(retriever.score(*encoded), expected, atol=1e-5)
    explained = retriever.explain(tmp_path / "one.png", captions[0])
    assert explained.values["score"] == pytest.approx(expected[0, 0], abs=1e-5)
    assert explained.caption == captions[0]
    with pytest.raises(DataError, match="give images"):
        retriever.encode_images([])
    for captions in ([], "a red circle"):
        with pytest.raises(DataError, match="give a list of captions"):
            retriever.encode_texts(captions)
    with pytest.raises(DataError, match=r"two\.png: No such file"):
        retriever.encode_images([tmp_path / "two.png"])


@pytest.fixture(scope="module")
def retriever(mefn_run):
    return mefn_jax.load(mefn_run, "latest")


@pytest.mark.parametrize(
    "images",
    [None, 3, "x.jpg", b"bytes", Path("x.jpg"), {}, [], (), [None], [3], [[]], [np.zeros((4, 4, 3))], np.zeros(3)],
)
def test_encode_images_refuses_what_is_no_list_of_images(images, retriever):
    with pytest.raises(DataError, match=r"encode_images: give images, a list|image 0 is .*; give a path, or the bytes"):
        retriever.encode_images(images)


@pytest.mark.parametrize("image", ["a\0b.png", "nowhere.png", ".", "n" * 300, b"", b"no image"])
def test_encode_images_names_image_that_cannot_be_read(image, retriever):
    with pytest.raises(DataError) as refused:
        retriever.encode_images([image])
    assert "image 0" in str(refused.value) if isinstance(image, bytes) else image[:1] in str(refused.value)


@pytest.mark.parametrize(
    "captions", [None, 3, "a red circle", b"x", {}, [], [None], [3], [b"red"], np.zeros(2), [["a"]]]
)
def test_encode_texts_refuses_what_is_no_list_of_texts(captions, retriever):
    with pytest.raises(
        DataError, match=r"encode_texts: give a list of captions|encode_texts: caption 0 is no text but"
    ):
        retriever.encode_texts(captions)


def test_encode_texts_takes_every_sequence_of_texts(retriever):
    expected = retriever.encode_texts(["a red circle", "a blue square"])
    for captions in (("a red circle", "a blue square"), np.array(["a red circle", "a blue square"])):
        np.testing.assert_array_equal(retriever.encode_texts(captions).pooled, expected.pooled)


def test_score_refuses_what_is_not_encoded(retriever):
    texts = retriever.encode_texts(["a red circle"])
    wrong = [None, 3, "text", np.zeros((1, 8)), [texts], Features(None, None, None), Features(*[np.zeros((2, 3))] * 3)]
    wrong.append(Features(texts.fragments[:0], texts.mask[:0], texts.pooled[:0]))
    for features in wrong:
        for pair, name in (((features, texts), "images"), ((texts, features), "texts")):
            with pytest.raises(DataError, match=f"score: {name} are .*; give what encode_{name} of this model returns"):
                retriever.score(*pair)
    narrow = Features(texts.fragments[..., :2], texts.mask, texts.pooled[..., :2])
    with pytest.raises(DataError, match="other numbers of dimensions"):
        retriever.score(narrow, texts)


def test_explain_refuses_what_is_no_image_or_no_text(retriever):
    for pair, message in (
        ((None, "a circle"), "the image is NoneType"),
        ((b"", "a circle"), "image"),
        ((b"", 3), "no text"),
    ):
        with pytest.raises(DataError, match=message):
            retriever.explain(*pair)


@pytest.mark.parametrize("workdir", [None, 3, "", "a\0b", b"runs"])
def test_load_refuses_what_is_no_directory(workdir):
    with pytest.raises(ConfigError, match="load: workdir is"):
        mefn_jax.load(workdir)


@pytest.mark.parametrize("step", ["\N{SUPERSCRIPT TWO}", None, -1, 1.5])
def test_load_refuses_what_is_no_step(step, mefn_run):
    with pytest.raises(ConfigError, match="not best, latest or the number of a step"):
        mefn_jax.load(mefn_run, step)
