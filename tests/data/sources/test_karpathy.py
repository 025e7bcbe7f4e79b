"""Karpathy's JSON of COCO and Flickr30K, and messages for malformed input."""

import json

import pytest
from sample_data import write_karpathy

from mefn_jax.data.sources import karpathy
from mefn_jax.errors import DataError


def test_karpathy_counts_restval_as_training_data(tmp_path):
    write_karpathy(tmp_path)
    splits, notes = karpathy.read(tmp_path / "dataset_coco.json", tmp_path / "images")
    assert {k: len(v) for k, v in splits.items()} == {"train": 22, "val": 3, "test": 2}
    assert notes == ["dataset_coco.json: 2 images of restval are training data"]
    first = splits["val"][0]
    assert first["image_id"] == "val2014/val_0.jpg"
    assert first["image"].is_file()
    assert first["captions"][:2] == ["A dog number 0, val 0.", "A dog number 1, val 0."]


def read_changed_entry(root, change):
    entries = write_karpathy(root, (("train", 2),), 1)
    change(entries[1])
    (root / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    with pytest.raises(DataError) as error:
        karpathy.read(root / "dataset_coco.json", root / "images")
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("split"), "images[1]: the key 'split' is missing; present are"),
        (lambda e: e.update(split="trian"), "images[1]: split 'trian' is none of train, restval, val, test"),
        (lambda e: e.update(filename=7), "images[1]: 'filename' must be of type str, found '7'"),
        (lambda e: e.update(sentences={}), "images[1]: 'sentences' must be of type list"),
        (lambda e: e.update(sentences=[]), "images[1]: no sentences"),
        (lambda e: e.update(sentences=["x"]), "images[1].sentences[0]: expected an object with the key 'raw'"),
        (lambda e: e.update(sentences=[{"raw": " \n"}]), "images[1].sentences[0]: empty caption"),
        (lambda e: e.update(filename="gone.jpg"), "image 'train2014/gone.jpg' is not in"),
        (lambda e: e.update(filepath="", filename="../../etc/passwd"), "leaves the image folder"),
        (lambda e: e.update(filepath="..", filename="dataset_coco.json"), "leaves the image folder"),
        (lambda e: e.update(filename="a\0b"), "is no usable file name"),
    ],
)
def test_karpathy_names_wrong_entry(change, message, tmp_path):
    assert message in read_changed_entry(tmp_path, change)
