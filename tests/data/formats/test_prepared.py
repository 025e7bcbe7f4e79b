"""Prepared data sets with damaged files."""

import json
import shutil

import pytest

from mefn_jax.data.dataset import Dataset
from mefn_jax.errors import DataError


def edit(path, change):
    path.write_text(change(path.read_text()))


def truncate_shard(root):
    shard = next(root.glob("*-train.array_record-*"))
    shard.write_bytes(shard.read_bytes()[:5000])


def set_caption_counts(counts):
    """Returns the damage that replaces the numbers of captions in the metadata."""
    return lambda root: edit(root / "metadata.json", lambda t: json.dumps(json.loads(t) | {"caption_counts": counts}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "features.json").unlink(), "damaged"),
        (lambda root: (root / "features.json").write_text("{}"), "damaged"),
        (lambda root: (root / "metadata.json").write_text("{"), "damaged"),
        (lambda root: (root / "dataset_info.json").write_text("[" * 100_000), "dataset_info.json: not JSON"),
        (lambda root: (root / "dataset_info.json").write_text('{"name": 3}'), "'name' must be of type str"),
        (lambda root: (root / "dataset_info.json").write_text('{"name": "coco_captions"}'), "damaged"),
        (lambda root: (root / "tokenizer.json").write_bytes(b"\xff"), "tokenizer.json: not UTF-8"),
        (lambda root: next(root.glob("*-train.array_record-*")).unlink(), "damaged"),
        (truncate_shard, "damaged"),
        (set_caption_counts({"train": [5], "val": [5]}), "40 examples of train, but caption_counts has 1"),
        (set_caption_counts([5]), "metadata.json: 'caption_counts' must be of type dict"),
        (set_caption_counts({"train": 5}), "caption_counts: 'train' must be of type list"),
        (set_caption_counts({"train": [5] * 39 + ["5"]}), "'train' must be a list of whole numbers above 0"),
        (set_caption_counts({"train": [5] * 39 + [-1]}), "'train' must be a list of whole numbers above 0"),
        (lambda root: (root / "metadata.json").write_text("[]"), "neither made by python -m mefn_jax.data.prepare"),
    ],
)
def test_prepared_dataset_names_damaged_file(prepared, tmp_path, damage, message):
    root = tmp_path / "copy"
    shutil.copytree(prepared, root)
    damage(root)

    def read():
        dataset = Dataset(root)
        return dataset.tokenizer_json, dataset.split("train").all_captions()

    with pytest.raises(DataError, match=message):
        read()
