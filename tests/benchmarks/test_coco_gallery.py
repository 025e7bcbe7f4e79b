"""Reader of COCO's test split with all positives: ids, order, the package of the positives, and damaged files."""

import importlib
import json
import sys

import numpy as np
import pytest
from benchmark_data import write_coco_test, write_positives

from mefn_jax.benchmarks.readers import coco
from mefn_jax.benchmarks.request import Request
from mefn_jax.errors import DataError


def request(root, **options):
    return Request("eccv", "published elsewhere", None, str(root), **options)


@pytest.mark.parametrize("name", ["eccv", "cxc"])
def test_positives_are_those_of_the_files(name, tmp_path):
    ids, sentence_ids = write_coco_test(tmp_path)
    gallery = {"eccv": coco.read_eccv, "cxc": coco.read_cxc}[name](request(tmp_path))
    assert gallery.own_order
    assert gallery.images.num_images == 10
    assert len(gallery.captions) == 50  # the sixth caption of an image is not of the published split
    assert gallery.captions[7] == f"A dog number 2 of {ids[1]}."
    order = [sentid for key in ids for sentid in sentence_ids[key]]
    i2t = json.loads((tmp_path / f"{name}_image_to_caption.json").read_text())
    positions = {sentid: c for c, sentid in enumerate(order)}
    assert {str(ids[k]): of.tolist() for k, of in gallery.i2t.items()} == {
        key: [positions.get(sentid, -1) for sentid in of] for key, of in i2t.items()
    }
    assert any(-1 in of for of in gallery.i2t.values()) == (name == "eccv")
    t2i = json.loads((tmp_path / f"{name}_caption_to_image.json").read_text())
    assert {str(order[c]): [ids[k] for k in of] for c, of in gallery.t2i.items()} == t2i


def test_positives_come_from_the_installed_package(tmp_path, monkeypatch):
    ids, sentence_ids = write_coco_test(tmp_path / "coco")
    for path in (tmp_path / "coco").glob("*_*_to_*.json"):
        path.unlink()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    with pytest.raises(
        DataError, match=r"eccv_caption has the positives .*pip install eccv_caption; published elsewhere"
    ):
        coco.read_eccv(request(tmp_path / "coco"))
    write_positives(tmp_path / "site" / "eccv_caption" / "data", ids, sentence_ids)
    (tmp_path / "site" / "eccv_caption" / "__init__.py").write_text("raise RuntimeError('is not imported')")
    importlib.invalidate_caches()
    assert len(coco.read_eccv(request(tmp_path / "coco")).i2t) == 5


def test_captions_in_another_order_have_no_folds(tmp_path):
    write_coco_test(tmp_path)
    path = tmp_path / "dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"].reverse()
    path.write_text(json.dumps(content))
    gallery = coco.read_cxc(request(tmp_path))
    assert not gallery.own_order
    assert gallery.captions[0].endswith(f"of {content['images'][2]['cocoid']}.")


def test_regions_get_the_ids_of_the_published_order(tmp_path, capsys):
    write_coco_test(tmp_path / "coco")
    positives = coco.read_eccv(request(tmp_path / "coco"))
    (tmp_path / "coco" / "dataset_coco.json").unlink()
    rows = np.random.default_rng(0).normal(size=(10, 4, 6)).astype(np.float32)
    np.save(tmp_path / "coco" / "testall_ims.npy", rows)
    (tmp_path / "coco" / "testall_caps.txt").write_text("".join(f"a dog {k}\n" for k in range(50)))
    gallery = coco.read_eccv(request(tmp_path / "coco"))
    assert "in the published order" in capsys.readouterr().out
    assert gallery.images.region_width == 6
    for side in ("i2t", "t2i"):
        own, other = getattr(gallery, side), getattr(positives, side)
        assert {k: v.tolist() for k, v in own.items()} == {k: v.tolist() for k, v in other.items()}
    (tmp_path / "coco" / "testall_caps.txt").write_text("".join(f"a dog {k}\n" for k in range(10)))
    with pytest.raises(DataError, match="testall has 10 captions, but the published order 50"):
        coco.read_eccv(request(tmp_path / "coco"))


def damage_karpathy(change):
    def damage(root):
        path = root / "dataset_coco.json"
        content = json.loads(path.read_text())
        change(content["images"])
        path.write_text(json.dumps(content))

    return damage


def write_json(name, content):
    return lambda root: (root / name).write_text(json.dumps(content))


DAMAGES = [
    (damage_karpathy(lambda x: x[1].update(cocoid=x[0]["cocoid"])), r"the image with COCO's id 391895 occurs twice"),
    (
        damage_karpathy(lambda x: x[1].update(filename=x[0]["filename"])),
        "two images of the split test have the same file",
    ),
    (damage_karpathy(lambda x: x[0].update(split="val")), r"the (image|caption) with COCO's id \d+ is not in it"),
    (damage_karpathy(lambda x: [e.update(split="val") for e in x]), "no image of the split test"),
    (damage_karpathy(lambda x: x[3]["sentences"][2].pop("sentid")), r"images\[3\].sentences\[2\]: the key 'sentid'"),
    (damage_karpathy(lambda x: x[3].update(sentences=[])), r"images\[3\]: none of its captions"),
    (lambda root: next((root / "val2014").glob("*391895*")).unlink(), r"images\[0\]: image .*391895.jpg' is not in"),
    (write_json("eccv_image_to_caption.json", {"1": ["2"]}), r"eccv_image_to_caption.json: '1': expected an id and"),
    (write_json("eccv_image_to_caption.json", {}), r"expected an object of ids"),
    (write_json("eccv_image_to_caption.json", {"7": [770337]}), r"the image with COCO's id 7 is not in it"),
    (lambda root: np.save(root / "coco_test_ids.npy", np.zeros(3, int)), r"coco_test_ids.npy: expected the ids"),
    (lambda root: (root / "coco_test_ids.npy").write_bytes(b"no"), r"coco_test_ids.npy: cannot be read"),
    (lambda root: (root / "dataset_coco.json").unlink(), r"no dataset_coco.json or .* in it; published elsewhere"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_galleries_are_named_in_one_line(damage, message, tmp_path):
    write_coco_test(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        coco.read_eccv(request(tmp_path))
    assert "\n" not in str(error.value)
