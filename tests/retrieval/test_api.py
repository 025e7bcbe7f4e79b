"""The Python API, `mefn_jax.load`."""

import numpy as np
import pytest

import mefn_jax
from mefn_jax.errors import DataError


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
