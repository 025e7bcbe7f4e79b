"""COCO's own captions files."""

from sample_data import write_coco

from mefn_jax.data.sources import coco


def test_coco_orders_captions_by_id_and_counts_images_without_captions(tmp_path):
    write_coco(tmp_path)
    splits, notes = coco.read(tmp_path, tmp_path / "images")
    assert {k: len(v) for k, v in splits.items()} == {"train": 20, "val": 3}
    assert splits["val"][1]["captions"] == [f"caption {n} of 1" for n in (4, 3, 2, 1, 0)]
    assert notes == [f"captions_{s}2017.json: left out 1 images without captions" for s in ("train", "val")]
