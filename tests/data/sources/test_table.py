"""Tables of images and captions, CSV or JSON lines, and messages for malformed input."""

import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_data import save_images, write_table

from mefn_jax.data.sources import table
from mefn_jax.errors import DataError


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_table_gathers_captions_of_each_image(kind, tmp_path):
    path = write_table(tmp_path, kind)
    splits, _ = table.read(path, tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {"train": 20, "val": 4}
    assert splits["val"][0]["captions"] == ['say "0", 20', 'say "1", 20']
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / f"train.{kind}").write_text(path.read_text())
    assert set(table.read(folder, tmp_path)[0]) == {"train"}  # the file's name is the split


@pytest.mark.parametrize("name", ["/etc/passwd", "link.jpg"])
def test_table_refuses_absolute_paths_and_links_out_of_image_folder(name, tmp_path):
    images = tmp_path / "images"
    save_images(images, ["inside.jpg"])
    (images / "link.jpg").symlink_to("/etc/passwd")
    (tmp_path / "train.csv").write_text(f"image,caption\ninside.jpg,fine\n{name},out\n")
    with pytest.raises(DataError, match=r"train.csv:3: image '.*' leaves the image folder"):
        table.read(tmp_path, images)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"image,caption\nx.jpg\n", "train.csv:2: the number of columns differs from the header"),
        (b"image,caption\nx.jpg,a,b\n", "train.csv:2: the number of columns differs from the header"),
        (b"picture,caption\nx.jpg,a\n", "train.csv:2: the key 'image' is missing; present are picture, caption"),
        (b'image,caption\nx.jpg,"open\n', "train.csv:.*not CSV"),
        (b"image,caption\nx.jpg,caf\xe9\n", "train.csv: not UTF-8 at byte 23"),
        (b"", "no rows"),
        (b"image,caption,caption\nx.jpg,a,b\n", "train.csv:1: two columns are called 'caption'"),
        (b"\n\nimage,image,caption\n", "train.csv:3: two columns are called 'image'"),
        (b"image,caption, caption\nx.jpg,a,b\n", "train.csv:1: two columns are called 'caption'"),
        (b"image,caption\nx.jpg," + b"a" * 140_000, "train.csv:2: not CSV"),
        (b'image,caption\nx.jpg,"two\nlines"\nx.jpg,a,b\n', "train.csv:4: the number of columns"),
        (b'image,caption\nx.jpg,"two\nlines"\ngone.jpg,"two\nlines"\n', "train.csv:4: image 'gone.jpg' is not in"),
    ],
)
def test_table_names_wrong_row(text, message, tmp_path):
    save_images(tmp_path, ["x.jpg"])
    (tmp_path / "train.csv").write_bytes(text)
    with pytest.raises(DataError, match=message):
        table.read(tmp_path, tmp_path)


def test_table_reads_csv_with_further_columns_without_name(tmp_path):
    save_images(tmp_path, ["x.jpg"])
    (tmp_path / "train.csv").write_text("image,caption,,\nx.jpg,a dog,,\n\nx.jpg,a cat,,\n")
    assert table.read(tmp_path, tmp_path)[0]["train"][0]["captions"] == ["a dog", "a cat"]


def test_table_refuses_json_line_with_a_key_twice(tmp_path):
    save_images(tmp_path, ["x.jpg"])
    (tmp_path / "train.jsonl").write_text('\n{"image": "x.jpg", "caption": "a", "caption": "b"}\n')
    with pytest.raises(DataError, match=r"train.jsonl:2: not JSON \(the key 'caption' occurs twice"):
        table.read(tmp_path, tmp_path)


RELAXED = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


def error_message(read, path, images) -> str:
    """Returns the message of a DataError, or the path if there is none. Any other exception fails the test, and so does
    a message that cannot be printed."""
    try:
        read(path, images)
    except DataError as e:
        return str(e).encode().decode()
    return str(path)


@RELAXED
@given(st.binary(max_size=200) | st.text(string.printable + "é", max_size=200).map(str.encode), st.booleans())
def test_table_reads_any_file_or_raises_data_error(tmp_path, data, as_csv):
    for name in ("train.csv", "train.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
    path = tmp_path / ("train.csv" if as_csv else "train.jsonl")
    path.write_bytes((b"image,caption\n" if as_csv else b"") + data)
    assert str(tmp_path) in error_message(table.read, tmp_path, tmp_path)


NAMES = st.sampled_from(
    ["x.jpg", "./x.jpg", "y.jpg", "", "split", "image", "caption", "train", "dev", "\ud800", 0, None]
)
ROWS = st.lists(st.dictionaries(NAMES.filter(lambda x: isinstance(x, str)), NAMES | st.text(max_size=5)), max_size=4)


@RELAXED
@given(ROWS | st.lists(st.lists(NAMES, max_size=4), max_size=4), st.booleans())
def test_table_reads_any_rows_or_raises_data_error(tmp_path, rows, as_csv):
    if not (tmp_path / "x.jpg").is_file():
        save_images(tmp_path, ["x.jpg", "y.jpg"])
    path = tmp_path / ("data.csv" if as_csv else "data.jsonl")
    if as_csv:
        lines = [",".join(map(str, row)) for row in [["image", "caption", "split"], *rows]]
        path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    assert str(tmp_path) in error_message(table.read, path, tmp_path)
