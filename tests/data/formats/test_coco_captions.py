"""TFDS's own `coco_captions` in array_record: its features and splits, read as TFDS wrote it."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from commands import SMOKE_FLICKR8K
from PIL import Image

from mefn_jax.benchmarks.readers import coco
from mefn_jax.benchmarks.readers.positives import PositiveIds
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.digests import digest_data
from mefn_jax.errors import DataError

NUMBERS = {"train": 20, "restval": 2, "val": 4, "test": 3}


class CocoCaptions(tfds.core.GeneratorBasedBuilder):
    """TFDS's builder with its features, but without its downloads."""

    VERSION = tfds.core.Version("1.1.0")
    name = "coco_captions"
    captions = 6

    def _info(self):
        f = tfds.features
        objects = {"id": np.int64, "area": np.int64, "bbox": f.BBoxFeature(), "label": np.int64, "is_crowd": np.bool_}
        features = {
            "image": f.Image(encoding_format="jpeg"),
            "image/filename": f.Text(),
            "image/id": np.int64,
            "objects": f.Sequence(objects),
            "captions": f.Sequence({"text": np.str_, "id": np.int64}),
        }
        return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in NUMBERS}

    def _generate_examples(self, split):
        box = {"id": 1, "area": 4, "bbox": tfds.features.BBox(0.0, 0.0, 0.5, 0.5), "label": 1, "is_crowd": False}
        for k in range(NUMBERS[split]):
            image = io.BytesIO()
            Image.new("RGB", (40, 30), (k * 9 % 256, 80, 160)).save(image, "JPEG")
            image.seek(0)
            yield (
                k,
                {
                    "image": image,
                    "image/filename": f"COCO_{split}_{k:012}.jpg",
                    "image/id": k,
                    "objects": [box],
                    "captions": [
                        {"text": f"Dog {n} of {split} {k}. ", "id": 100 * k + n} for n in range(self.captions)
                    ],
                },
            )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    builder = CocoCaptions(file_format="array_record", data_dir=tmp_path_factory.mktemp("tfds"))
    builder.download_and_prepare()
    return builder.data_path


def test_coco_captions_keeps_five_captions_and_trains_on_restval(directory):
    dataset = Dataset(directory)
    assert dataset.splits == ("train", "val", "test")
    assert dataset.tokenizer_json is None
    for name, images in (("train", 22), ("dev", 4), ("test", 3)):
        split = dataset.split(name)
        assert (split.num_images, split.num_captions) == (images, 5 * images)
    split = dataset.split("train")
    names = {split.record(k)["image_id"] for k in range(22)}
    assert names == {f"COCO_train_{k:012}.jpg" for k in range(20)} | {f"COCO_restval_{k:012}.jpg" for k in range(2)}
    for k in (0, 21):
        record = split.record(k)
        _, part, number = record["image_id"].removesuffix(".jpg").split("_")
        assert record["captions"] == [f"Dog {n} of {part} {int(number)}." for n in range(5)]
        assert Image.open(io.BytesIO(record["image"])).size == (40, 30)


def test_coco_captions_has_digests_of_its_captions(directory, tmp_path, monkeypatch):
    found = digest_data(Dataset(directory))
    assert found["train"]
    assert found["val"]
    assert found["features"] is None
    monkeypatch.setattr(CocoCaptions, "captions", 5)  # the sixth was not used
    builder = CocoCaptions(file_format="array_record", data_dir=tmp_path)
    builder.download_and_prepare()
    assert digest_data(Dataset(builder.data_path)) == found


def test_coco_captions_refuses_fewer_captions_and_other_file_formats(tmp_path, directory, monkeypatch):
    monkeypatch.setattr(CocoCaptions, "captions", 4)
    builder = CocoCaptions(file_format="array_record", data_dir=tmp_path)
    builder.download_and_prepare()
    with pytest.raises(DataError, match=r"COCO_val_\d+.jpg: 4 captions, fewer than 5"):
        Dataset(builder.data_path).split("val").record(0)
    info = builder.data_path / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match="stored as tfrecord, which has no random access; build it with"):
        Dataset(builder.data_path)


@pytest.mark.slow  # the data set is read in the other tests, and a prepared one is trained on in test_train.py
def test_coco_captions_trains_and_evaluates(directory, tmp_path, command):
    text = command(
        "train.py", *SMOKE_FLICKR8K, f"--config.data.dir={directory}", f"--workdir={tmp_path / 'run'}"
    ).stdout
    assert "training a tokenizer on the 110 training captions" in text
    table = command("eval.py", f"--workdir={tmp_path / 'run'}", "--split=test").stdout
    assert "test: 3 images, 15 captions (5 per image)" in table


def test_benchmark_gallery_is_put_into_the_published_order(directory, tmp_path, monkeypatch):
    """The captions that are published are kept, here the second to the sixth, in the order of the images there."""
    positives = {"i2t": {2: [201, 5]}, "t2i": {5: [0, 2]}}
    order = np.array([100 * k + n for k in (2, 0, 1) for n in range(1, 6)])
    monkeypatch.setattr(coco, "read_positives", lambda request, name: PositiveIds(**positives, order=order))
    gallery = coco.read_eccv(Request("eccv", "published elsewhere", None, str(directory)))
    assert gallery.own_order
    assert gallery.captions[:6] == [f"Dog {n} of test 2." for n in range(1, 6)] + ["Dog 1 of test 0."]
    assert gallery.images.record(1)["image_id"] == "0"
    assert {k: v.tolist() for k, v in gallery.i2t.items()} == {0: [0, 9]}
    assert {k: v.tolist() for k, v in gallery.t2i.items()} == {9: [1, 0]}
