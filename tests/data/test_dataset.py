"""`Dataset`: messages, held-out images, and images that cannot be decoded."""

import numpy as np
import pytest
from sample_data import PREPARE_OPTIONS, make_tokenizer, write_flickr8k

from mefn_jax.data import images, pipeline
from mefn_jax.data.dataset import HELD_OUT, Dataset
from mefn_jax.data.prepare import prepare
from mefn_jax.errors import DataError


def test_dataset_errors_name_option_and_splits(tmp_path, prepared):
    with pytest.raises(DataError, match=r"data.dir: .*nowhere: no such directory; make one with"):
        Dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a data set"):
        Dataset(tmp_path)
    with pytest.raises(DataError, match=r"no split 'test'; present are train, val"):
        Dataset(prepared).split("test")
    with pytest.raises(DataError, match=r"no split 'trian', did you mean 'train'"):
        Dataset(prepared).split("trian")


def test_held_out_images_are_last_of_train_and_leave_it(regions_and_words):
    root, words = regions_and_words
    dataset = Dataset(root / "regions", held_out_images=5, cached_text=str(root / "words"), max_tokens=9)
    train, held = dataset.split("train"), dataset.split(HELD_OUT)
    assert (train.num_images, held.num_images, train.num_captions, held.num_captions) == (15, 5, 75, 25)
    whole = Dataset(root / "regions").split("train")
    assert train.all_captions() + held.all_captions() == whole.all_captions()
    np.testing.assert_array_equal(held.records.read(held.record_ids), whole.records.read(whole.record_ids[15:]))
    np.testing.assert_array_equal(held.cached_text.read(np.array([3]))[0][0][: len(words[78])], words[78])
    np.testing.assert_array_equal(held.caption_image, np.repeat(np.arange(5), 5))
    with pytest.raises(DataError, match=r"data.held_out_images=20: train has only 20 images"):
        Dataset(root / "regions", held_out_images=20).split("train")


def test_skip_undecodable_leaves_out_broken_images(tmp_path):
    root = write_flickr8k(tmp_path / "source", numbers=(6, 4))
    image = root / "Images" / "train_2.jpg"
    image.write_bytes(image.read_bytes()[:500])
    prepare("flickr8k", root, tmp_path / "out", **PREPARE_OPTIONS)
    dataset = Dataset(tmp_path / "out")
    tokenizer = make_tokenizer(dataset)
    with pytest.raises(DataError, match=r"train_2.jpg"):
        [pipeline.training_dataset(dataset.split("train"), tokenizer, images.Resize(16), 6, 0)[k] for k in range(5)]
    split = Dataset(tmp_path / "out", skip_undecodable=True).split("train")
    assert split.skipped == ["train_2.jpg"]
    assert (split.num_images, split.num_captions) == (5, 25)
    batches = [pipeline.training_dataset(split, tokenizer, images.Resize(16), 5, 0)[k] for k in range(5)]
    np.testing.assert_array_equal(np.sort(np.concatenate([b["caption_index"] for b in batches])), np.arange(25))
    assert [split.record(k)["image_id"] for k in range(5)] == [f"train_{k}.jpg" for k in (0, 1, 3, 4, 5)]
