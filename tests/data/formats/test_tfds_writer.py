"""The writer of TFDS data sets."""

from sample_data import PREPARE_OPTIONS, write_flickr8k

from mefn_jax.data.dataset import Dataset
from mefn_jax.data.formats import tfds_writer
from mefn_jax.data.prepare import prepare


def test_example_files_keep_order_across_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_writer, "SHARD", 4)
    prepare("flickr8k", write_flickr8k(tmp_path / "source"), tmp_path / "out", **PREPARE_OPTIONS)
    assert len(list((tmp_path / "out").glob("*-train.array_record-*"))) == 3
    split = Dataset(tmp_path / "out").split("train")
    assert [split.record(k)["image_id"] for k in range(12)] == [f"train_{k}.jpg" for k in range(12)]
    assert split.num_captions == 60
