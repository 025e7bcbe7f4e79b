"""Digests of data: what changes them, what does not, and that they are the same in every format."""

import json
import shutil

import numpy as np
import pytest
from sample_data import PREPARE_OPTIONS, write_cached_text, write_flickr8k, write_precomputed

from mefn_jax.data import digests
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.digests import digest_data, digest_gallery, find_changes
from mefn_jax.data.prepare import prepare


@pytest.fixture(scope="module")
def flickr8k_source(tmp_path_factory):
    """A folder in Flickr8k's format."""
    return write_flickr8k(tmp_path_factory.mktemp("source") / "flickr8k")


def prepare_again(source, out, change=lambda text: text):
    """Prepares a Flickr8k folder, with its captions changed, at the same path `out`."""
    shutil.rmtree(out, ignore_errors=True)
    token = source / "Flickr8k.token.txt"
    text = token.read_text()
    token.write_text(change(text))
    try:
        prepare("flickr8k", str(source), out, **PREPARE_OPTIONS)
    finally:
        token.write_text(text)
    return Dataset(out)


def test_digest_of_prepared_data_changes_with_one_caption_alone(flickr8k_source, tmp_path):
    first = digest_data(prepare_again(flickr8k_source, tmp_path / "out"))
    assert first == digest_data(prepare_again(flickr8k_source, tmp_path / "out"))
    (line,) = [
        x for x in (flickr8k_source / "Flickr8k.token.txt").read_text().splitlines() if x[:13] == "train_7.jpg#2"
    ]
    changed = digest_data(
        prepare_again(flickr8k_source, tmp_path / "out", lambda text: text.replace(line, line + " again"))
    )
    assert find_changes(first, changed) == ["the image ids or captions of train"]
    assert changed["val"] == first["val"]
    assert first["features"] is None
    # What is not known does not differ.
    assert find_changes(None, changed) == find_changes({"train": None}, changed) == []
    assert find_changes(first, dict.fromkeys(first)) == []


def test_digest_does_not_depend_on_options_that_leave_images_out(flickr8k_source, tmp_path):
    plain = digest_data(prepare_again(flickr8k_source, tmp_path / "out"))
    assert digest_data(Dataset(tmp_path / "out", skip_undecodable=True, held_out_images=3)) == plain
    held_out = Dataset(tmp_path / "out", held_out_images=3)
    assert digest_gallery(held_out.split("train")) != digest_gallery(Dataset(tmp_path / "out").split("train"))


def test_digest_of_large_split_samples_images_and_all_numbers_of_captions(flickr8k_source, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "DIGESTED_IMAGES", 3)
    first = digest_data(prepare_again(flickr8k_source, tmp_path / "out"))

    def drop_one(text):
        return "".join(line for line in text.splitlines(True) if not line.startswith("train_4.jpg#4"))

    def replace_all(text):
        return "".join(line.replace("\t", "\tzebra ") for line in text.splitlines(True))

    for change in (drop_one, replace_all):
        changed = digest_data(prepare_again(flickr8k_source, tmp_path / "out", change))
        assert "the image ids or captions of train" in find_changes(first, changed), change


def test_digest_of_precomputed_regions_covers_captions_ids_and_features(tmp_path):
    rows = write_precomputed(tmp_path, "train", 20, ids="rows")
    dataset = Dataset(tmp_path)
    first = digest_data(dataset)
    assert first["val"] is None
    for change, part in (
        (lambda: np.save(tmp_path / "train_ims.npy", rows * 2), "the precomputed regions or cached text of train"),
        (lambda: (tmp_path / "train_ids.txt").write_text("".join(f"x{k}\n" for k in range(20))), "image ids"),
        (lambda: (tmp_path / "train_caps.txt").write_text("another caption\n" * 100), "captions"),
    ):
        change()
        assert any(part in text for text in find_changes(first, digest_data(Dataset(tmp_path))))
        write_precomputed(tmp_path, "train", 20, ids="rows")
        assert digest_data(Dataset(tmp_path)) == first
    captions = dataset.split("train").all_captions()
    words = tmp_path / "words"
    write_cached_text(words, "train", captions)
    with_words = digest_data(Dataset(tmp_path, cached_text=words))
    write_cached_text(words, "train", captions, width=7)
    assert find_changes(with_words, digest_data(Dataset(tmp_path, cached_text=words))) == [
        "the precomputed regions or cached text of train"
    ]


def test_digest_of_gallery_is_that_of_every_format_and_place(prepared, tmp_path):
    split = Dataset(prepared).split("val")
    write_precomputed(tmp_path, "dev", split.num_images)
    (tmp_path / "dev_caps.txt").write_text("".join(f"{caption}\n" for caption in split.all_captions()))
    ids = [split.record(k)["image_id"] for k in range(split.num_images)]
    (tmp_path / "dev_ids.txt").write_text("".join(f"{name}\n" for name in ids))
    assert digest_gallery(Dataset(tmp_path).split("val")) == digest_gallery(split)
    (tmp_path / "dev_ids.txt").write_text("".join(f"{name}\n" for name in reversed(ids)))
    assert digest_gallery(Dataset(tmp_path).split("val")) != digest_gallery(split)


def test_digest_of_damaged_split_is_unknown(tmp_path):
    write_precomputed(tmp_path, "train", 4)
    write_precomputed(tmp_path, "dev", 4)
    (tmp_path / "dev_caps.txt").write_bytes(b"\xff")
    found = digest_data(Dataset(tmp_path))
    assert found["val"] is None
    assert found["train"]
    json.dumps(found)  # as a checkpoint keeps it
