"""Tars of samples: WebDataset's and img2dataset's, and hostile ones."""

import gzip
import io
import json
import re
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_data import write_tar

from mefn_jax.data.sources import webdataset
from mefn_jax.data.sources.shard import Columns, Example, Fault
from mefn_jax.errors import DataError


def make_jpeg(color=0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (2, 2), (color, 0, 0)).save(out, "JPEG")
    return out.getvalue()


A, B = make_jpeg(1), make_jpeg(2)


def read_all(folder, columns=None) -> tuple[list[Example], list[str]]:
    """Returns the examples of all tars of a folder, and the messages of its faults."""
    shards, _ = webdataset.read(folder, folder, columns or Columns())
    items = [item for shard in shards for item in shard.read()]
    return [x for x in items if isinstance(x, Example)], [x.message for x in items if isinstance(x, Fault)]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_samples_of_images_with_text_or_json(mode, tmp_path):
    suffix = {"w": ".tar", "w:gz": ".tar.gz", "w:bz2": ".tar.bz2", "w:xz": ".tar.xz"}[mode]
    members = [
        ("x/0.jpg", A),
        ("x/0.txt", b"\xef\xbb\xbfa  dog\n"),
        ("x/0.cls", b"\xff"),
        ("./1.JPG", B),
        ("./1.json", b'{"captions": ["a", "b"]}'),
        ("2.json", b'{"width": 3}'),
        ("2.png", A),
        ("2.txt", "caf\u00e9".encode()),
    ]
    write_tar(tmp_path / "val" / f"0{suffix}", members, mode)
    assert read_all(tmp_path) == (
        [
            Example("val", A, "val/0/x/0.jpg", ["a dog"]),
            Example("val", B, "val/0/1.JPG", ["a", "b"]),
            Example("val", A, "val/0/2.png", ["caf\u00e9"]),
        ],
        [],
    )


def test_img2datasets_output_is_read(tmp_path):
    """Its tars have the caption as text and in JSON; statistics and tables lie beside them."""

    def write_json(key, caption, status="success"):
        facts = {"caption": caption, "url": "u", "key": key, "status": status, "error_message": None, "width": 2}
        return f"{key}.json", json.dumps(facts).encode()

    members = [
        ("000000000.jpg", A),
        write_json("000000000", "a dog"),
        ("000000000.txt", b"a dog"),
        write_json("000000001", "lost", "failed_to_download"),
        ("000000001.txt", b"lost"),
        ("000000002.jpg", B),
        write_json("000000002", None),
        ("000000002.txt", b""),
    ]
    write_tar(tmp_path / "00000.tar", members)
    for name in ("00000_stats.json", "00000.parquet"):
        (tmp_path / name).write_bytes(b"{}")
    examples, faults = read_all(tmp_path)
    assert examples == [Example("train", A, "00000/000000000.jpg", ["a dog"])]
    assert [fault.split("00000.tar: ")[1] for fault in faults] == [
        "'000000001': no image (status 'failed_to_download'); present are json, txt",
        "'000000002': json: no caption in 'caption'; write one or remove the entry",
    ]
    assert webdataset.read(tmp_path, tmp_path, Columns())[1] == ["1 tars name no split, and are training data"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", A)], "'a': no caption; add a.txt or a.json"),
        ([("a.txt", b"x")], "'a': no image; present are txt"),
        ([("a.b.jpg", A), ("a.txt", b"x")], "'a': no image; present are b.jpg, txt"),
        ([("a.jpg", A), ("a.png", B), ("a.txt", b"x")], "several images .jpg, png.; choose by --image_column"),
        ([("a.jpg", A), ("a.jpg", B), ("a.txt", b"x")], "'a': the key occurs a second time"),
        ([("a.jpg", b"<html>"), ("a.txt", b"x")], "'a': not an image"),
        ([("a.jpg", b""), ("a.txt", b"x")], "'a': the image is empty"),
        ([("a.jpg", A), ("a.txt", b" \n")], "txt: empty caption"),
        ([("a.jpg", A), ("a.txt", b"caf\xe9")], "txt: not UTF-8 at byte 3"),
        ([("a.jpg", A), ("a.json", b'{"caption": NaN}')], "caption: a caption must be a text, found 'nan'"),
        ([("a.jpg", A), ("a.json", b'{"captions": [["a"]]}')], r"captions\[0\]: a caption must be a text"),
        ([("a.jpg", A), ("a.json", b'{"captions": []}')], "no caption in 'captions'"),
        ([("a.jpg", A), ("a.json", b'["caption"]')], "json: expected an object, found list"),
        ([("a.jpg", A), ("a.json", b"[" * 100_000)], "json: not JSON"),
        ([("a.jpg", A), ("a.json", b'{"caption": "a", "caption": "b"}')], "the key 'caption' occurs twice"),
        ([("a.jpg", A), ("a.json", b'{"caption": "\\ud800"}')], "half of a character"),
        ([("/etc/passwd.jpg", A), ("b.jpg", A), ("b.txt", b"x")], "'/etc/passwd.jpg': the name leaves the archive"),
        ([("a/../../b.jpg", A)], "the name leaves the archive"),
    ],
)
def test_samples_that_cannot_be_used_are_named(members, message, tmp_path):
    write_tar(tmp_path / "train.tar", [*members, ("z.jpg", A), ("z.txt", b"fine")])
    before = set(tmp_path.rglob("*"))
    examples, faults = read_all(tmp_path)
    assert examples[-1] == Example("train", A, "train/z.jpg", ["fine"])
    assert len(faults) == 1
    assert re.search(message, faults[0]), faults[0]
    assert faults[0].startswith(f"{tmp_path}/train.tar: ")
    assert set(tmp_path.rglob("*")) == before


def test_a_key_that_comes_back_later_is_a_fault(tmp_path):
    members = [(f"{key}.{suffix}", data) for key in "aba" for suffix, data in (("jpg", A), ("txt", b"x"))]
    write_tar(tmp_path / "0.tar", members)
    examples, faults = read_all(tmp_path)
    assert [e.image_id for e in examples] == ["0/a.jpg", "0/b.jpg"]
    assert len(faults) == 1


def test_links_devices_and_large_members_are_faults(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (
            ("a.jpg", tarfile.SYMTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.FIFOTYPE),
            ("d.jpg", tarfile.CHRTYPE),
            ("e", tarfile.DIRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    examples, faults = read_all(tmp_path)
    assert not examples
    assert [f.rpartition(": ")[2] for f in faults] == ["a link or device, not a file; store the file itself"] * 4
    header = tarfile.TarInfo("a.jpg")
    header.size = 2**40  # claimed, but not there
    (tmp_path / "0.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + A)
    examples, faults = read_all(tmp_path)
    assert not examples
    assert faults == [f"{tmp_path}/0.tar: 'a.jpg': cut (it claims 1,099,511,627,776 bytes); copy the file again"]
    (tmp_path / "0.tar").write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + A))
    assert "it claims 1,099,511,627,776 bytes" in read_all(tmp_path)[1][0]
    members = [("a.jpg", A + bytes(2**10)), ("a.txt", b"x" * 2**23), ("b.jpg", A), ("b.txt", b"x")]
    write_tar(tmp_path / "0.tar", members)
    examples, faults = read_all(tmp_path)
    assert [e.image_id for e in examples] == ["0/b.jpg"]
    assert faults == [f"{tmp_path}/0.tar: 'a.txt': 8,388,608 bytes, more than 4,194,304; remove it"]


def test_name_that_is_not_utf_8_is_a_fault(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in (("caf\udce9.jpg", A), ("caf\udce9.txt", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    examples, faults = read_all(tmp_path)
    assert not examples
    assert "the image's name is not UTF-8" in faults[0]
    faults[0].encode()


def write_samples(path, number=6, mode="w"):
    members = [(f"{k}.{suffix}", data) for k in range(number) for suffix, data in (("jpg", A), ("txt", b"x"))]
    return write_tar(path, members, mode)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_that_is_cut_anywhere_is_a_fault(suffix, tmp_path):
    """Also between two members, and with what stands before the cut."""
    path = write_samples(tmp_path / f"0{suffix}", mode="w:gz" if suffix == ".tar.gz" else "w")
    content = path.read_bytes()
    length = 12 * 1024 + 100 if suffix == ".tar" else len(content) - 1  # members, and some of the end
    for cut in range(0, length, 512 if suffix == ".tar" else 23):
        path.write_bytes(content[:cut])
        examples, faults = read_all(tmp_path)
        # The end of a compressed tar, without any data, is not read.
        assert any("cut" in fault for fault in faults) or (suffix == ".tar.gz" and len(examples) == 6), cut
    path.write_bytes(content)
    assert read_all(tmp_path)[1] == []


def test_empty_tars_have_no_samples(tmp_path):
    write_tar(tmp_path / "0.tar", [])
    assert read_all(tmp_path) == ([], [])


def test_gzip_of_zeros_ends(tmp_path):
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(b"\0" * 10**7))
    assert read_all(tmp_path) == ([], [])


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_tar_gives_examples_or_faults(data, tmp_path_factory):
    """Whatever bytes are changed or cut, there is no error, and what is read is an image with a caption."""
    root = tmp_path_factory.mktemp("damaged")
    path = write_samples(root / "0.tar", 3)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 6 * 1024))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    examples, faults = read_all(root)
    assert all(e.captions and e.image_id.startswith("0/") for e in examples)
    assert all(f.startswith(f"{path}: ") and "\n" not in f.encode().decode() for f in faults)


def test_read_names_a_missing_path(tmp_path):
    with pytest.raises(DataError, match=r"no \.tar or .* file in it; give the folder of the tars"):
        webdataset.read(tmp_path, tmp_path, Columns())
