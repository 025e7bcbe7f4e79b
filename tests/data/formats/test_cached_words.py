"""Cached text features: reading by caption, and files that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mefn_jax.data import pipeline
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.formats import cached_words
from mefn_jax.errors import DataError


def test_cached_text_reads_captions_cut_to_length(regions_and_words):
    root, words = regions_and_words
    split = Dataset(root / "regions", cached_text=str(root / "words"), max_tokens=4).split("train")
    vectors, mask = split.cached_text.read(np.array([7, 0, 99]))
    assert (vectors.shape, vectors.dtype) == ((3, 4, 6), np.float16)
    for k, caption in enumerate((7, 0, 99)):
        assert mask[k].sum() == min(4, len(words[caption]))
        np.testing.assert_array_equal(vectors[k][mask[k]], words[caption][:4])
        assert not vectors[k][~mask[k]].any()
    batch = pipeline.training_dataset(split, None, None, 8, seed=0)[3]
    expected, mask = split.cached_text.read(batch["caption_index"])
    np.testing.assert_array_equal(batch["text"], expected)
    np.testing.assert_array_equal(batch["text_mask"], mask)


def test_cached_text_names_file_that_does_not_fit(regions_and_words):
    root, _ = regions_and_words

    def error_message():
        with pytest.raises(DataError) as e:
            Dataset(root / "regions", cached_text=str(root / "words"), max_tokens=4).split("train").cached_text.read(
                [2]
            )
        return str(e.value)

    captions = (root / "words" / "train_caps.txt").read_text()
    (root / "words" / "train_caps.txt").write_text(captions.replace("dog number 3 of train 1.", "cat"))
    assert "differ from the 100 of data.dir's train from caption 8 on" in error_message()
    (root / "words" / "train_caps.txt").write_text(captions)
    states = np.load(root / "words" / "train_words.npy")
    np.save(root / "words" / "train_words.npy", states[:-1])
    assert "train_word_offsets.npy: does not fit train_words.npy" in error_message()
    np.save(root / "words" / "train_words.npy", states.astype(np.float32))
    assert "expected float16 (words, width), found float32" in error_message()
    states[14] = np.nan
    np.save(root / "words" / "train_words.npy", states)
    assert "the words of caption 2 have NaN or inf" in error_message()
    np.save(root / "words" / "train_words.npy", np.array([{}], object))
    assert "cannot be read as an array" in error_message()
    (root / "words" / "train_words.npy").unlink()
    assert "no such file; write it with python -m mefn_jax.precompute" in error_message()


def test_cached_text_take_maps_the_same_file(regions_and_words):
    root, words = regions_and_words
    split = Dataset(root / "regions", cached_text=str(root / "words"), max_tokens=9).split("train")
    taken = split.cached_text.take(10, 20)
    unpickled = cached_words.CachedText.__new__(cached_words.CachedText)
    unpickled.__setstate__(taken.__getstate__())
    assert len(taken) == len(unpickled) == 10
    for cached in (taken, unpickled):
        np.testing.assert_array_equal(cached.read(np.array([2]))[0][0, : len(words[12])], words[12])
    assert jnp.asarray(taken.read(np.array([2]))[1]).dtype == jax.dtypes.canonicalize_dtype(bool)
