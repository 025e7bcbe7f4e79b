"""Hugging Face's image folders: metadata in JSON lines and CSV, splits by folder, and what is wrong in them."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_data import save_images

from mefn_jax.data.sources import imagefolder
from mefn_jax.data.sources.shard import Columns, Fault
from mefn_jax.errors import DataError


def read_all(folder, columns=None):
    """Returns the examples of a folder as (split, id, captions), and the messages of its faults."""
    shards, _ = imagefolder.read(folder, folder, columns or Columns())
    items = [item for shard in shards for item in shard.read()]
    faults = [item.message for item in items if isinstance(item, Fault)]
    return [(x.split, x.image_id, x.captions) for x in items if not isinstance(x, Fault)], faults


def write_lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_splits_are_folders_with_a_table_each_or_one_for_all(tmp_path):
    save_images(tmp_path / "a", ["train/0.jpg", "train/deep/1.jpg", "validation/2.jpg"])
    (tmp_path / "a" / "train" / "metadata.csv").write_text('file_name,text\n0.jpg,"a, b"\ndeep/1.jpg,c\n0.jpg,d\n')
    write_lines(tmp_path / "a" / "validation" / "metadata.jsonl", [{"file_name": "2.jpg", "captions": ["e", "f"]}])
    expected = [
        ("train", "train/0.jpg", ["a, b", "d"]),
        ("train", "train/deep/1.jpg", ["c"]),
        ("val", "validation/2.jpg", ["e", "f"]),
    ]
    assert read_all(tmp_path / "a") == (expected, [])
    save_images(tmp_path / "b", [name for _, name, _ in expected])
    rows = [{"file_name": name, "caption": captions} for _, name, captions in expected]
    write_lines(tmp_path / "b" / "metadata.jsonl", rows)
    assert read_all(tmp_path / "b") == (expected, [])


def test_images_without_a_split_are_training_data_and_a_column_names_one(tmp_path):
    save_images(tmp_path, ["0.jpg", "1.jpg"])
    write_lines(
        tmp_path / "metadata.jsonl", [{"file_name": "0.jpg", "prompt": "a"}, {"file_name": "1.jpg", "prompt": "b"}]
    )
    columns = Columns(captions=("prompt",))
    assert read_all(tmp_path, columns) == ([("train", "0.jpg", ["a"]), ("train", "1.jpg", ["b"])], [])
    notes = imagefolder.read(tmp_path, tmp_path, columns)[1]
    assert notes == ["2 images are in no folder of a split, and are training data"]
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": "0.jpg", "text": "a", "split": "dev"}])
    assert read_all(tmp_path) == ([("val", "0.jpg", ["a"])], [])


def test_what_cannot_be_used_is_left_out_with_all_its_rows(tmp_path):
    save_images(tmp_path, [f"train/{k}.jpg" for k in range(5)])
    (tmp_path / "secret.jpg").symlink_to("/etc/passwd")
    (tmp_path / "train" / "3.jpg").write_bytes(b"<html>")
    rows = [("0.jpg", "a"), ("1.jpg", None), ("2.jpg", "b"), ("2.jpg", " "), ("3.jpg", "c"), ("gone.jpg", "d")]
    rows += [("../secret.jpg", "e"), ("/etc/passwd", "f"), ("./0.jpg", "g"), ("a\0b", "h"), ("4.jpg", ["i", None])]
    write_lines(tmp_path / "train" / "metadata.jsonl", [{"file_name": n, "caption": c} for n, c in rows])
    examples, faults = read_all(tmp_path)
    assert examples == [("train", "train/0.jpg", ["a", "g"])]
    assert len(faults) == 8
    starts = [
        ":2: no caption in 'caption'",
        ":4: caption: empty caption",
        ":6: image 'train/gone.jpg' is not in",
        ":7: image 'train/../secret.jpg' leaves the image folder",
        ":8: image '/etc/passwd' leaves the image folder",
    ]
    for start in starts:
        assert any(fault.startswith(f"{tmp_path}/train/metadata.jsonl{start}") for fault in faults), (start, faults)
    assert any("is no usable file name" in fault for fault in faults)
    assert any(fault.startswith(f"{tmp_path}/train/3.jpg: not an image") for fault in faults)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file": "0.jpg", "text": "a"}', "metadata.jsonl:1: the key 'file_name' is missing"),
        ('{"file_name": "0.jpg"}', "metadata.jsonl:1: no column of captions among none; name it by --caption_columns"),
        ('{"file_name": "0.jpg", "text": "a"', "metadata.jsonl:1: not JSON"),
        ('{"file_name": 0, "text": "a"}', "metadata.jsonl:1: 'file_name' must be of type str"),
        ("", "no rows of images in metadata.jsonl or metadata.csv"),
    ],
)
def test_malformed_tables_are_an_error(text, message, tmp_path):
    save_images(tmp_path, ["0.jpg"])
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_all(tmp_path)


def test_a_folder_without_metadata_is_an_error(tmp_path):
    save_images(tmp_path, ["0.jpg"])
    with pytest.raises(DataError, match=r"no metadata.jsonl or metadata.csv file in it"):
        read_all(tmp_path)


NAMES = st.sampled_from(["0.jpg", "./0.jpg", "train/0.jpg", "..", "", "/", "\0", "\ud800", "gone.jpg"]) | st.text(
    max_size=4
)
VALUES = st.none() | st.integers() | st.text(max_size=5) | st.lists(st.none() | st.text(max_size=3), max_size=3)
ROWS = st.lists(st.fixed_dictionaries({"file_name": NAMES}, optional={"caption": VALUES, "split": VALUES}), max_size=5)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS)
def test_any_rows_are_read_or_named(tmp_path, rows):
    if not (tmp_path / "0.jpg").exists():
        save_images(tmp_path, ["0.jpg", "train/0.jpg"])
    write_lines(tmp_path / "metadata.jsonl", rows)
    try:
        examples, faults = read_all(tmp_path)
    except DataError as e:
        examples, faults = [], [str(e)]
    assert all(captions and split in ("train", "val", "test") for split, _, captions in examples)
    assert all(str(tmp_path) in fault.encode().decode() for fault in faults)
