"""Precomputed regions of SCAN and VSE++: repeated rows, any dtype, and files that do not fit."""

import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_data import write_precomputed

from mefn_jax.data.dataset import Dataset
from mefn_jax.data.formats import precomputed
from mefn_jax.errors import DataError


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("ids", [None, "rows", "captions"])
@pytest.mark.parametrize("shape", [(3, 4), (6,)])
def test_precomputed_reads_repeated_rows_as_one_image(tmp_path, repeated, ids, shape):
    rows = write_precomputed(tmp_path / "x", "train", 6, repeated, shape, ids=ids)
    split = Dataset(tmp_path / "x").split("train")
    assert (split.num_images, split.num_captions, split.region_width) == (6, 30, shape[-1])
    regions = split.records.read(split.record_ids)
    np.testing.assert_array_equal(regions, rows.reshape(6, -1, shape[-1]))
    for k in (0, 5):
        assert split.record(k)["captions"] == [f"A dog number {n} of train {k}." for n in range(5)]
        np.testing.assert_array_equal(split.record(k)["regions"], rows[k].reshape(-1, shape[-1]))
    assert split.all_captions() == [f"A dog number {n} of train {k}." for k in range(6) for n in range(5)]


def test_precomputed_keeps_all_images_of_flickr30k_dev(tmp_path):
    write_precomputed(tmp_path, "dev", 1014)
    split = Dataset(tmp_path).split("dev")
    assert (split.name, split.num_images, split.num_captions) == ("val", 1014, 5070)


def test_precomputed_groups_rows_by_ids(tmp_path):
    rows = np.arange(40, dtype=np.float32).reshape(10, 2, 2)
    np.save(tmp_path / "train_ims.npy", rows)
    (tmp_path / "train_caps.txt").write_text("".join(f"caption {k}\n" for k in range(10)))
    assert Dataset(tmp_path).split("train").num_images == 10
    ids = (7, 7, 7, 8, 8, 9, 9, 9, 9, 5)
    (tmp_path / "train_ids.txt").write_text("".join(f"{k}\n" for k in ids))
    with pytest.raises(DataError, match="rows 0 and 2 should belong to one image, but differ"):
        Dataset(tmp_path).split("train")
    np.save(tmp_path / "train_ims.npy", rows[list(ids)])
    split = Dataset(tmp_path).split("train")
    assert [split.record(k)["image_id"] for k in range(4)] == ["7", "8", "9", "5"]
    np.testing.assert_array_equal(split.caption_offsets, [0, 3, 5, 9, 10])
    np.testing.assert_array_equal(split.records.read(split.record_ids), rows[[7, 8, 9, 5]])
    (tmp_path / "train_ids.txt").write_text("".join(f"{k}\n" for k in (7, 7, 7, 8, 8, 9, 9, 9, 9, 7)))
    with pytest.raises(DataError, match=r"train_ids.txt: an id stands in several places"):
        Dataset(tmp_path).split("train")


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4", np.uint8, np.int64])
def test_region_records_convert_any_number_type(tmp_path, dtype):
    rows = write_precomputed(tmp_path, "train", 4, dtype=dtype)
    split = Dataset(tmp_path).split("train")
    regions = split.records.read(split.record_ids[[2, 0]])
    assert regions.dtype == (np.float16 if dtype == np.float16 else np.float32)
    np.testing.assert_array_equal(regions, rows[[2, 0]].astype(regions.dtype))


def test_region_file_is_reopened_after_pickling(tmp_path):
    rows = write_precomputed(tmp_path, "train", 400, shape=(36, 64))
    split = Dataset(tmp_path).split("train")
    sent = pickle.dumps(split.records.regions)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent).read([399])[0], rows[399])


def test_region_file_releases_mapped_pages(tmp_path, monkeypatch):
    path = tmp_path / "big.npy"
    np.lib.format.open_memmap(path, "w+", np.float32, (600, 36, 2048))[:] = 1  # 177 MB
    monkeypatch.setattr(precomputed, "MAPPED_BYTES", 2**24)
    regions = precomputed.RegionFile(path)

    def resident_kb():
        with open("/proc/self/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Rss"))

    before, largest = resident_kb(), 0
    for row in range(0, 600, 20):
        regions.read(range(row, row + 20))
        largest = max(largest, resident_kb() - before)
    assert largest < 80_000  # kB


def change_rows(change):
    """Returns a function that changes the array in train_ims.npy."""

    def edit(root):
        path = root / "train_ims.npy"
        np.save(path, change(np.load(path)))

    return edit


def put_value(value):
    def change(x):
        x[3, 1, 2] = value
        return x

    return change_rows(change)


def write_object_array(root):
    np.save(root / "train_ims.npy", np.array([{"a": 1}] * 6, object), allow_pickle=True)


def write_pickle(root):
    (root / "train_ims.npy").write_bytes(pickle.dumps([1, 2, 3]))


def truncate_rows(root):
    path = root / "train_ims.npy"
    path.write_bytes(path.read_bytes()[:-8])


def write_archive(root):
    with (root / "train_ims.npy").open("wb") as file:
        np.savez(file, x=np.zeros((6, 3, 4)))


def write_bytes(name, text):
    return lambda root: (root / name).write_bytes(text)


def read_all(root):
    split = Dataset(root).split("train")
    return split.records.read(split.record_ids)


def error_message(root) -> str:
    """Returns the message of a DataError, or the path if there is none. Any other exception fails the test."""
    try:
        read_all(root)
    except DataError as e:
        return str(e)
    return str(root)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put_value(np.nan), r"train_ims.npy: row 3 has NaN or inf"),
        (put_value(np.inf), r"train_ims.npy: row 3 has NaN or inf"),
        (put_value(-np.inf), r"train_ims.npy: row 3 has NaN or inf"),
        (
            change_rows(lambda x: x[:5]),
            r"train_ims.npy has 5 rows, train_caps.txt 30 captions; give five captions for each row",
        ),
        (change_rows(lambda x: x[:, 0, 0]), r"the shape \(6,\) is neither"),
        (change_rows(lambda x: x.astype(str)), r"expected numbers, found <U"),
        (change_rows(lambda x: x[:0]), r"the shape \(0, 3, 4\) is neither"),
        (write_object_array, r"train_ims.npy: not a NumPy array of numbers .* pickles, which are refused"),
        (write_pickle, r"train_ims.npy: not a NumPy array of numbers .* pickles, which are refused"),
        (truncate_rows, r"train_ims.npy: not a NumPy array"),
        (write_archive, r"train_ims.npy: expected numbers, found an archive"),
        (write_bytes("train_ims.npy", b""), r"train_ims.npy: not a NumPy array"),
        (write_bytes("train_caps.txt", b"one\n\nthree\n"), r"train_caps.txt:2: empty caption"),
        (write_bytes("train_caps.txt", b"caf\xe9\n" * 30), r"train_caps.txt: not UTF-8 at byte 3"),
        (change_rows(np.asfortranarray), r"train_ims.npy: in Fortran order"),
        (lambda root: (root / "train_ims.npy").rename(root / "val_ims.npy"), r"rename the files of val to dev_ims.npy"),
        (write_bytes("train_ids.txt", b"1\n2\n"), r"train_ids.txt: 2 ids, but 6 rows and 30 captions"),
        (lambda root: (root / "train_caps.txt").unlink(), r"train_caps.txt: no such file"),
    ],
)
def test_precomputed_names_file_that_does_not_fit(tmp_path, edit, message):
    write_precomputed(tmp_path, "train", 6)
    edit(tmp_path)
    with pytest.raises(DataError, match=message):
        read_all(tmp_path)


def test_precomputed_accepts_large_finite_numbers(tmp_path):
    write_precomputed(tmp_path, "train", 6)
    put_value(3e38)(tmp_path)  # its square is infinite in float32
    split = Dataset(tmp_path).split("train")
    assert split.records.read(split.record_ids).max() == np.float32(3e38)


def test_precomputed_skips_repeated_rows_that_are_not_finite(tmp_path):
    write_precomputed(tmp_path, "train", 6, repeated=True)
    path = tmp_path / "train_ims.npy"
    rows = np.load(path)
    rows[:5, 1] = np.nan
    np.save(path, rows)
    split = Dataset(tmp_path, skip_undecodable=True).split("train")
    assert (split.num_images, split.num_captions, split.skipped) == (5, 25, ["0"])
    rows[5:] = np.nan
    np.save(path, rows)
    with pytest.raises(DataError, match="no image of train can be used"):
        Dataset(tmp_path, skip_undecodable=True).split("train")


def test_precomputed_skips_image_with_regions_that_are_not_finite(tmp_path):
    write_precomputed(tmp_path, "train", 6)
    put_value(np.nan)(tmp_path)
    split = Dataset(tmp_path, skip_undecodable=True).split("train")
    assert (split.num_images, split.num_captions, split.skipped) == (5, 25, ["3"])
    assert split.record(3)["captions"][0] == "A dog number 0 of train 4."
    assert np.isfinite(split.records.read(split.record_ids)).all()


SHAPES = st.lists(st.integers(-1, 10**25) | st.booleans(), max_size=4).map(tuple)
# Starts of .npy files with arbitrary descriptions of the array.
HEADERS = (
    st.text(max_size=60)
    | st.builds(
        lambda shape, d: f"{{'descr': '{d}', 'fortran_order': False, 'shape': {shape}}}", SHAPES, st.text(max_size=4)
    )
).map(lambda text: b"\x93NUMPY\x01\x00" + len(text.encode()).to_bytes(2, "little") + text.encode() + bytes(48))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | HEADERS, st.sampled_from(["ims.npy", "caps.txt", "ids.txt"]))
def test_precomputed_reads_any_file_or_raises_data_error(tmp_path, data, name):
    write_precomputed(tmp_path, "train", 6)
    (tmp_path / f"train_{name}").write_bytes(data)
    assert str(tmp_path) in error_message(tmp_path)
