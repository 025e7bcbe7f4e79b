"""Tables of images and captions, CSV or JSON lines, and messages for malformed input."""

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
    ],
)
def test_table_names_wrong_row(text, message, tmp_path):
    save_images(tmp_path, ["x.jpg"])
    (tmp_path / "train.csv").write_bytes(text)
    with pytest.raises(DataError, match=message):
        table.read(tmp_path, tmp_path)


RELAXED = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


def error_message(read, path, images) -> str:
    """Returns the message of a DataError, or the path if there is none. Any other exception fails the test."""
    try:
        read(path, images)
    except DataError as e:
        return str(e)
    return str(path)


@RELAXED
@given(st.binary(max_size=200) | st.text(string.printable + "é", max_size=200).map(str.encode), st.booleans())
def test_table_reads_any_file_or_raises_data_error(tmp_path, data, as_csv):
    for name in ("train.csv", "train.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
    path = tmp_path / ("train.csv" if as_csv else "train.jsonl")
    path.write_bytes((b"image,caption\n" if as_csv else b"") + data)
    assert str(tmp_path) in error_message(table.read, tmp_path, tmp_path)
