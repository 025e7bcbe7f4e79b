"""Parquet shards: columns and their kinds, splits, rows of one image, and damaged files."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mefn_jax.data.sources import parquet
from mefn_jax.data.sources.shard import Columns, Example, Fault
from mefn_jax.errors import DataError


def make_png(color=0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (2, 2), (color, 0, 0)).save(out, "PNG")
    return out.getvalue()


A, B = make_png(1), make_png(2)


def read_all(folder, columns=None) -> tuple[list[Example], list[str]]:
    """Returns the examples of all shards of a folder, and the messages of its faults."""
    shards, _ = parquet.read(folder, folder, columns or Columns())
    items = [item for shard in shards for item in shard.read()]
    return [x for x in items if isinstance(x, Example)], [x.message for x in items if isinstance(x, Fault)]


def write(path, rows, **options):
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00003.parquet", "train"),
        ("data/validation-00000-of-00001-a1b2.parquet", "val"),
        ("default/test/0000.parquet", "test"),
        ("dev.parquet", "val"),
        ("part-0.parquet", "train"),
        ("trained/0.parquet", "train"),
    ],
)
def test_split_is_that_of_the_file_or_folder(name, split, tmp_path):
    write(tmp_path / name, [{"image": {"bytes": A, "path": "a.png"}, "text": "a  dog"}])
    examples, faults = read_all(tmp_path)
    assert examples == [Example(split, A, "a.png", ["a dog"])]
    assert not faults
    notes = parquet.read(tmp_path, tmp_path, Columns())[1]
    assert bool(notes) == (name in ("part-0.parquet", "trained/0.parquet"))


def test_split_column_comes_before_the_name_of_the_file(tmp_path):
    rows = [
        {"image": A, "caption": [s], "split": s, "filename": f"{s}.png"}
        for s in ("train", "dev", "TEST", "restval", "x")
    ]
    write(tmp_path / "TEST-0000-of-0009.parquet", rows)
    examples, faults = read_all(tmp_path)
    assert [(e.split, e.image_id) for e in examples] == [
        ("train", "train.png"),
        ("val", "dev.png"),
        ("test", "TEST.png"),
        ("train", "restval.png"),
    ]
    assert faults == [f"{tmp_path}/TEST-0000-of-0009.parquet: row 4: split 'x' is none of train, val, test"]


def test_images_are_bytes_paths_or_both(tmp_path):
    (tmp_path / "a.png").write_bytes(A)
    rows = [{"bytes": A, "path": None}, {"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}]
    write(tmp_path / "train-0.parquet", [{"image": image, "caption": "x"} for image in rows])
    write(tmp_path / "train-1.parquet", [{"image": "a.png", "caption": "x"}, {"image": "../b", "caption": "x"}])
    write(
        tmp_path / "train-2.parquet", pa.table({"jpg": pa.array([B], pa.large_binary()), "caption": ["x"], "key": [7]})
    )
    examples, faults = read_all(tmp_path)
    assert [(e.image, e.image_id) for e in examples] == [
        (A, "train-0/0"),
        (A, "a.png"),
        (A, "a.png"),
        (B, "7"),
    ]
    assert [fault.split(": ", 1)[1][:40] for fault in faults] == [
        "row 2: the image is empty",
        "row 1: image '../b' leaves the image fol",
    ]


def test_rows_of_one_image_are_its_captions(tmp_path):
    named = [
        {"image": {"bytes": data, "path": name}, "caption": text}
        for data, name, text in ((A, "a", "1"), (A, "a", "2"), (B, "b", "3"), (B, "c", "4"), (A, "c", "5"))
    ]
    write(tmp_path / "train-0.parquet", named, row_group_size=1)
    write(
        tmp_path / "train-1.parquet",
        [{"image": data, "caption": text} for data, text in ((A, "1"), (A, "2"), (B, "3"))],
    )
    examples, _ = read_all(tmp_path)
    assert [(e.image_id, e.captions) for e in examples] == [
        ("a", ["1", "2"]),
        ("b", ["3"]),
        ("c", ["4"]),
        ("c", ["5"]),
        ("train-1/0", ["1", "2"]),
        ("train-1/2", ["3"]),
    ]
    numbered, _ = read_all(tmp_path, Columns(image_id=parquet.ROW_NUMBERS))
    assert [e.image_id for e in numbered][:3] == ["train-0/0", "train-0/2", "train-0/4"]


def test_caption_columns_are_found_or_given(tmp_path):
    write(
        tmp_path / "train-0.parquet", [{"image": A, "caption_10": "c", "caption_2": "b", "caption_0": "a", "url": "u"}]
    )
    assert read_all(tmp_path)[0][0].captions == ["a", "b", "c"]
    assert read_all(tmp_path, Columns(captions=("url", "caption_2")))[0][0].captions == ["u", "b"]
    write(tmp_path / "train-0.parquet", [{"image": A, "Sentences_RAW": ["a", "b"], "sentids": [1]}])
    assert read_all(tmp_path)[0][0].captions == ["a", "b"]
    table = pa.table({"image": [A], "caption": pa.array(["x"]).dictionary_encode()})
    write(tmp_path / "train-0.parquet", table)
    assert read_all(tmp_path)[0][0].captions == ["x"]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"image": A, "caption": "a", "text": "b"},
            {},
            r"the captions may be in caption, text; choose by --caption_col",
        ),
        ({"image": A, "label": "a"}, {}, "no column of captions among image, label; name it by --caption_columns"),
        ({"photo": A, "caption": "a"}, {}, "no column of images; name it by --image_column"),
        ({"image": A, "caption": [["a"]]}, {}, r"column 'caption' is list<.*; it must hold a text or a list of texts"),
        ({"image": A, "caption": 1}, {}, "column 'caption' is int64; it must hold"),
        ({"image": [A], "caption": "a"}, {}, "column 'image' is list<.*; it must hold bytes, paths or"),
        ({"image": A, "caption": "a"}, {"captions": ("b",)}, "no column 'b'; present are image, caption"),
        ({"image": A, "caption": "a"}, {"image": "b"}, "--image_column=b: no such column"),
        ({"image": A, "caption": "a"}, {"image_id": "b"}, "--id_column=b: no such column"),
    ],
)
def test_columns_that_cannot_be_used_are_named(columns, options, message, tmp_path):
    write(tmp_path / "train-0.parquet", [columns])
    with pytest.raises(DataError, match=message) as error:
        read_all(tmp_path, Columns(**options))
    assert str(error.value).startswith(str(tmp_path / "train-0.parquet"))


def test_two_columns_of_one_name_are_an_error(tmp_path):
    table = pa.table([[A], ["a"], ["b"]], names=["image", "caption", "caption"])
    write(tmp_path / "train-0.parquet", table)
    with pytest.raises(DataError, match="two columns are called 'caption'"):
        read_all(tmp_path, Columns(captions=("caption",)))


def test_captions_that_are_missing_or_no_text_are_faults(tmp_path):
    captions = [None, [], ["a", None], ["a", " "], ["a\0b"], ["fine"]]
    table = pa.table({"image": [A] * 6, "caption": captions, "id": [f"{k}" for k in range(6)]})
    write(tmp_path / "train-0.parquet", table)
    examples, faults = read_all(tmp_path)
    assert [e.captions for e in examples] == [["a\0b"], ["fine"]]
    assert [
        fault.split(": ", 1)[1][: len(start)]
        for fault, start in zip(
            faults, ["row 0: no caption"] * 2 + ["row 2: caption[1]: no c", "row 3: caption[1]: empty"], strict=True
        )
    ] == ["row 0: no caption", "row 1: no caption", "row 2: caption[1]: no c", "row 3: caption[1]: empty"]


def test_text_that_is_not_utf_8_is_a_fault_of_its_row(tmp_path):
    offsets, data = pa.py_buffer(b"\0\0\0\0\4\0\0\0\5\0\0\0"), pa.py_buffer(b"caf\xe9a")
    captions = pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])
    write(tmp_path / "train-0.parquet", pa.table({"image": [A, B], "caption": captions}))
    examples, faults = read_all(tmp_path)
    assert [e.captions for e in examples] == [["a"]]
    assert len(faults) == 1
    assert "row 0: 'caption' cannot be read (UnicodeDecodeError" in faults[0]


def test_empty_shards_and_an_index_have_no_effect(tmp_path):
    schema = pa.schema({"image": pa.binary(), "caption": pa.string()})
    write(tmp_path / "train-0.parquet", schema.empty_table())
    rows = [{"image": A, "caption": str(k), "__index_level_0__": index} for k, index in enumerate((9, 2, 2, -1))]
    write(
        tmp_path / "train-1.parquet",
        [row | {"image": make_png(10 + k)} for k, row in enumerate(rows)],
        row_group_size=1,
    )
    (tmp_path / ".hidden.parquet").write_bytes(b"")
    examples, faults = read_all(tmp_path)
    assert [e.captions for e in examples] == [["0"], ["1"], ["2"], ["3"]]
    assert not faults


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1", b"PAR1" + b"\0" * 40 + b"\x20\0\0\0PAR1"]
)
def test_files_that_are_no_parquet_are_a_fault(content, tmp_path):
    (tmp_path / "train-0.parquet").write_bytes(content)
    examples, faults = read_all(tmp_path)
    assert not examples
    assert len(faults) == 1
    assert faults[0].startswith(f"{tmp_path}/train-0.parquet: cut or damaged from row 0 on (")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_damaged_file_gives_examples_or_faults(data, tmp_path_factory):
    """Whatever bytes are changed or cut, there is no other error, and what is read is an image."""
    root = tmp_path_factory.mktemp("damaged")
    rows = [{"image": {"bytes": make_png(k), "path": f"{k}.png"}, "caption": [f"text {k}"] * 2} for k in range(20)]
    write(root / "train-0.parquet", rows, row_group_size=5, compression="none")
    content = bytearray((root / "train-0.parquet").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    (root / "train-0.parquet").write_bytes(content[:cut])
    try:
        examples, faults = read_all(root)
    except DataError as e:
        examples, faults = [], [str(e)]
    assert all(e.image[:4] == b"\x89PNG" and e.captions and e.split == "train" for e in examples)
    assert all(f.startswith(f"{root}/train-0.parquet") and "\n" not in f for f in faults)


def test_read_names_a_missing_path(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        parquet.read(tmp_path / "none", tmp_path, Columns())
    with pytest.raises(DataError, match=r"no .parquet file in it"):
        parquet.read(tmp_path, tmp_path, Columns())
