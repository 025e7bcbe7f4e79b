"""Readers of Karpathy's JSON, COCO's captions and tables: the formats with their quirks, and hostile input."""

import json
import string

import pytest
from conftest import SMOKE, write_flickr8k
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mefn_jax.data.dataset import Dataset
from mefn_jax.data.sources import coco, flickr8k, karpathy, table
from mefn_jax.errors import DataError

READ = {"karpathy": karpathy.read, "coco": coco.read, "table": table.read}


def save_images(folder, names):
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (k * 9 % 256, 80, 160)).save(folder / name, "JPEG")


def write_karpathy(root, numbers=(("train", 20), ("restval", 2), ("val", 3), ("test", 2)), captions=6):
    """As `dataset_coco.json` has it: `filepath`, tokens beside the raw text, more than five captions."""
    entries = []
    for split, number in numbers:
        for k in range(number):
            sentences = [
                {"tokens": ["a", "dog"], "raw": f"A dog number {n}, {split} {k}.\n", "imgid": k, "sentid": n}
                for n in range(captions)
            ]
            folder = "val2014" if split != "train" else "train2014"
            entries.append(
                {"filepath": folder, "sentids": [0], "filename": f"{split}_{k}.jpg", "imgid": k, "split": split}
                | {"sentences": sentences, "cocoid": k}
            )
    save_images(root / "images", [f"{e['filepath']}/{e['filename']}" for e in entries])
    (root / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return entries


def write_coco(root):
    for split, number in (("train2017", 20), ("val2017", 3)):
        images = [{"id": 100 + k, "file_name": f"{k:012}.jpg", "height": 30} for k in range(number + 1)]
        notes = [
            {"image_id": 100 + k, "id": 1000 - 7 * k - n, "caption": f"caption {n} of {k}"}
            for k in range(number)  # the last image has none
            for n in range(5)
        ]
        save_images(root / "images" / split, [i["file_name"] for i in images])
        (root / f"captions_{split}.json").write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))


def write_table(root, kind):
    save_images(root, [f"photos/{k}.jpg" for k in range(24)])
    rows = [(f"photos/{k}.jpg", f'say "{n}", {k}', "train" if k < 20 else "dev") for n in range(2) for k in range(24)]
    if kind == "csv":
        lines = ["image,caption,split"] + ['{},"{}",{}'.format(i, c.replace('"', '""'), s) for i, c, s in rows]
    else:
        lines = [json.dumps({"image": i, "caption": c, "split": s}) for i, c, s in rows]
    path = root / f"data.{kind}"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_karpathy_counts_restval_as_training_data(tmp_path):
    write_karpathy(tmp_path)
    splits, notes = karpathy.read(tmp_path / "dataset_coco.json", tmp_path / "images")
    assert {k: len(v) for k, v in splits.items()} == {"train": 22, "val": 3, "test": 2}
    assert notes == ["dataset_coco.json: 2 images of restval are training data"]
    first = splits["val"][0]
    assert first["image_id"] == "val2014/val_0.jpg"
    assert first["image"].is_file()
    assert first["captions"][:2] == ["A dog number 0, val 0.", "A dog number 1, val 0."]


def test_coco_orders_captions_by_their_ids_and_counts_bare_images(tmp_path):
    write_coco(tmp_path)
    splits, notes = coco.read(tmp_path, tmp_path / "images")
    assert {k: len(v) for k, v in splits.items()} == {"train": 20, "val": 3}
    assert splits["val"][1]["captions"] == [f"caption {n} of 1" for n in (4, 3, 2, 1, 0)]
    assert notes == [f"captions_{s}2017.json: left out 1 images without captions" for s in ("train", "val")]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_gather_an_images_captions(kind, tmp_path):
    path = write_table(tmp_path, kind)
    splits, _ = table.read(path, tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {"train": 20, "val": 4}
    assert splits["val"][0]["captions"] == ['say "0", 20', 'say "1", 20']
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / f"train.{kind}").write_text(path.read_text())
    assert set(table.read(folder, tmp_path)[0]) == {"train"}  # the file's name decides


@pytest.mark.parametrize("source", ["karpathy", "coco", "table"])
def test_each_source_trains_and_evaluates(source, tmp_path, command):
    root = tmp_path / "source"
    root.mkdir()
    if source == "table":
        path, images = write_table(root, "csv"), root
    else:
        (write_karpathy if source == "karpathy" else write_coco)(root)
        path, images = root / "dataset_coco.json" if source == "karpathy" else root, root / "images"
    out = tmp_path / "out"
    args = (f"--source={source}", f"--path={path}", f"--images={images}", f"--out={out}")
    text = command("-m mefn_jax.data.prepare", *args).stdout
    if source == "karpathy":
        assert "kept the first 5 captions of 27 images that have more" in text
    split = Dataset(out).split("val")
    assert split.num_captions == split.num_images * (2 if source == "table" else 5)
    command("train.py", *SMOKE, f"--config.data.dir={out}", f"--workdir={tmp_path / 'run'}")
    table_text = command("eval.py", f"--workdir={tmp_path / 'run'}", "--split=dev").stdout
    assert f"val: {split.num_images} images, {split.num_captions} captions" in table_text


def broken_karpathy(root, change):
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
def test_a_wrong_entry_is_named(change, message, tmp_path):
    assert message in broken_karpathy(tmp_path, change)


@pytest.mark.parametrize("name", ["/etc/passwd", "link.jpg"])
def test_absolute_paths_and_links_out_are_refused(name, tmp_path):
    images = tmp_path / "images"
    save_images(images, ["inside.jpg"])
    (images / "link.jpg").symlink_to("/etc/passwd")
    (tmp_path / "train.csv").write_text(f"image,caption\ninside.jpg,fine\n{name},out\n")
    with pytest.raises(DataError, match=r"train.csv:3: image '.*' leaves the image folder"):
        table.read(tmp_path, images)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"image,caption\nx.jpg\n", "train.csv:2: not as many columns as the header"),
        (b"image,caption\nx.jpg,a,b\n", "train.csv:2: not as many columns as the header"),
        (b"picture,caption\nx.jpg,a\n", "train.csv:2: the key 'image' is missing; present are picture, caption"),
        (b'image,caption\nx.jpg,"open\n', "train.csv:.*not CSV"),
        (b"image,caption\nx.jpg,caf\xe9\n", "train.csv: not UTF-8 at byte 23"),
        (b"", "no rows"),
    ],
)
def test_a_wrong_table_is_named(text, message, tmp_path):
    save_images(tmp_path, ["x.jpg"])
    (tmp_path / "train.csv").write_bytes(text)
    with pytest.raises(DataError, match=message):
        table.read(tmp_path, tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "images",
                    "annotations",
                    "filename",
                    "filepath",
                    "split",
                    "sentences",
                    "raw",
                    "id",
                    "image_id",
                    "file_name",
                ]
            )
            | st.text(max_size=4),
            inner,
            max_size=6,
        )
    ),
    max_leaves=30,
)
RELAXED = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


def complaint(read, path, images) -> str:
    """What our own error says; the path where there is none. Any other exception goes through."""
    try:
        read(path, images)
    except DataError as e:
        return str(e)
    return str(path)


@RELAXED
@given(VALUES, st.sampled_from(["karpathy", "coco"]))
def test_any_json_gives_splits_or_our_own_error(tmp_path, value, source):
    path = tmp_path / "captions_train.json"
    path.write_text(json.dumps(value))
    assert str(tmp_path) in complaint(READ[source], tmp_path if source == "coco" else path, tmp_path)


@RELAXED
@given(st.binary(max_size=200) | st.text(string.printable + "é", max_size=200).map(str.encode), st.booleans())
def test_any_table_gives_splits_or_our_own_error(tmp_path, data, as_csv):
    for name in ("train.csv", "train.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
    path = tmp_path / ("train.csv" if as_csv else "train.jsonl")
    path.write_bytes((b"image,caption\n" if as_csv else b"") + data)
    assert str(tmp_path) in complaint(table.read, tmp_path, tmp_path)


def test_json_nested_without_end_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[" * 200_000)
    with pytest.raises(DataError, match="not JSON"):
        karpathy.read(path, tmp_path)


@pytest.fixture
def source_folder(tmp_path):
    return write_flickr8k(tmp_path / "flickr8k")


def test_flickr8ks_links_out_are_refused_too(source_folder):
    image = source_folder / "Images" / "dev_1.jpg"
    image.unlink()
    image.symlink_to("/etc/passwd")
    with pytest.raises(DataError, match=r"devImages.txt:2: image 'dev_1.jpg' leaves the image folder"):
        flickr8k.read(source_folder)
