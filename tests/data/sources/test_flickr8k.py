"""The Flickr8k format, and messages for malformed input."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.data.sources import flickr8k as source
from mefn_jax.errors import DataError


def edit(path, change):
    path.write_text(change(path.read_text()))


def test_flickr8k_keeps_order_of_split_lists(flickr8k):
    splits, notes = source.read(flickr8k)
    assert {k: len(v) for k, v in splits.items()} == {"train": 12, "val": 6}
    assert [e["image_id"] for e in splits["train"]] == [f"train_{k}.jpg" for k in range(12)]
    assert all(len(e["captions"]) == 5 for e in splits["val"])
    assert notes == ["Flickr8k.token.txt: skipped 1 captions whose image is in no split list"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("Flickr8k.token.txt", lambda t: "no tab here\n" + t, r"token.txt:1: not '<image>#<number><tab><caption>'"),
        ("Flickr8k.token.txt", lambda t: t + "\nx\n", r"token.txt:92: not"),
        ("Flickr8k.token.txt", lambda t: f"train_0.jpg#{'9' * 5000}\tx\n" + t, r"token.txt:1: not"),
        ("Flickr8k.token.txt", lambda t: "train_0.jpg#7\t  \n" + t, r"token.txt:1: empty caption of 'train_0.jpg'"),
        ("Flickr8k.token.txt", lambda t: "train_0.jpg#1\tagain\n" + t, r"caption train_0.jpg#1 occurs a second"),
        ("Flickr8k.token.txt", lambda t: t.replace("dev_2.jpg", "dev_x.jpg"), r"'dev_2.jpg' has no caption"),
        ("Flickr_8k.devImages.txt", lambda t: t + "gone.jpg\n", r"devImages.txt:7: image 'gone.jpg' is not in"),
        ("Flickr_8k.devImages.txt", lambda t: t + "../x.jpg\n", r"devImages.txt:7: '../x.jpg' is not a plain file"),
        ("Flickr_8k.devImages.txt", lambda t: t + "train_0.jpg\n", r"'train_0.jpg' is already listed"),
    ],
)
def test_flickr8k_names_file_and_line_of_malformed_input(flickr8k, file, change, message):
    edit(flickr8k / file, change)
    with pytest.raises(DataError, match=message):
        source.read(flickr8k)


def test_flickr8k_names_missing_part(flickr8k, tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        source.read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image folder"):
        source.read(tmp_path / "empty")
    (flickr8k / "Flickr8k.token.txt").write_bytes(b"train_0.jpg#0\t\xff\n")
    with pytest.raises(DataError, match="not UTF-8 at byte 14"):
        source.read(flickr8k)
    (flickr8k / "Flickr8k.token.txt").unlink()
    with pytest.raises(DataError, match=r"Flickr8k.token.txt: no such file"):
        source.read(flickr8k)


@settings(deadline=None, max_examples=200)
@given(
    st.text(max_size=60), st.lists(st.sampled_from(["a.jpg#0\tx", "a.jpg#1\ty z", "b#0\t", "\t#", "", "q"]), max_size=5)
)
def test_flickr8k_reads_any_token_file_or_raises_data_error(tmp_path_factory, text, lines):
    path = tmp_path_factory.mktemp("fuzz") / "token.txt"
    path.write_text("\n".join([*lines, text]), encoding="utf-8", errors="replace")
    with contextlib.suppress(DataError):  # any other exception fails the test
        captions, _ = source._read_tokens(path, {"a.jpg"})
        assert all(all(texts) for texts in captions.values())


def test_flickr8k_refuses_link_out_of_image_folder(flickr8k):
    image = flickr8k / "Images" / "dev_1.jpg"
    image.unlink()
    image.symlink_to("/etc/passwd")
    with pytest.raises(DataError, match=r"devImages.txt:2: image 'dev_1.jpg' leaves the image folder"):
        source.read(flickr8k)
