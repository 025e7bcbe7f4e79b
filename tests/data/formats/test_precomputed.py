"""SCAN's and VSE++'s precomputed regions: both repetition rules, any dtype, and files that do not fit."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import flickr30k
from mefn_jax import losses
from mefn_jax.config import check_config
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.formats import precomputed
from mefn_jax.data.from_config import fill_data_widths
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.model import MODEL_CHOICES


def write_precomp(root, split, images, repeated=False, shape=(3, 4), dtype=np.float32, ids=None):
    """One split in SCAN's format, five captions an image; returns the rows of the images."""
    root.mkdir(exist_ok=True)
    rows = np.random.default_rng(images).normal(size=(images, *shape)).astype(dtype)
    np.save(root / f"{split}_ims.npy", np.repeat(rows, 5, 0) if repeated else rows)
    lines = [f"A dog number {n} of {split} {k}." for k in range(images) for n in range(5)]
    (root / f"{split}_caps.txt").write_text("\n".join(lines) + "\n")
    number = {None: 0, "rows": images * (5 if repeated else 1), "captions": 5 * images}[ids]
    if number:
        numbers = range(number) if ids == "rows" else np.arange(number) // 5
        (root / f"{split}_ids.txt").write_text("".join(f"{k}\n" for k in numbers))
    return rows


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("ids", [None, "rows", "captions"])
@pytest.mark.parametrize("shape", [(3, 4), (6,)])
def test_both_repetition_rules_give_the_same_images(tmp_path, repeated, ids, shape):
    rows = write_precomp(tmp_path / "x", "train", 6, repeated, shape, ids=ids)
    split = Dataset(tmp_path / "x").split("train")
    assert (split.num_images, split.num_captions, split.region_width) == (6, 30, shape[-1])
    found = split.records.read(split.record_ids)
    np.testing.assert_array_equal(found, rows.reshape(6, -1, shape[-1]))
    for k in (0, 5):
        assert split.record(k)["captions"] == [f"A dog number {n} of train {k}." for n in range(5)]
        np.testing.assert_array_equal(split.record(k)["regions"], rows[k].reshape(-1, shape[-1]))
    assert split.all_captions() == [f"A dog number {n} of train {k}." for k in range(6) for n in range(5)]


def test_flickr30k_dev_keeps_all_images(tmp_path):
    write_precomp(tmp_path, "dev", 1014)
    split = Dataset(tmp_path).split("dev")
    assert (split.name, split.num_images, split.num_captions) == ("val", 1014, 5070)


def test_rows_that_differ_are_images_of_one_caption_and_repeated_ids_group_rows(tmp_path):
    rows = np.arange(40, dtype=np.float32).reshape(10, 2, 2)
    np.save(tmp_path / "train_ims.npy", rows)
    (tmp_path / "train_caps.txt").write_text("".join(f"caption {k}\n" for k in range(10)))
    assert Dataset(tmp_path).split("train").num_images == 10
    ids = (7, 7, 7, 8, 8, 9, 9, 9, 9, 5)
    (tmp_path / "train_ids.txt").write_text("".join(f"{k}\n" for k in ids))
    with pytest.raises(DataError, match="rows 0 and 2 should be one image's, but differ"):
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
def test_any_number_becomes_what_a_device_takes(tmp_path, dtype):
    rows = write_precomp(tmp_path, "train", 4, dtype=dtype)
    split = Dataset(tmp_path).split("train")
    found = split.records.read(split.record_ids[[2, 0]])
    assert found.dtype == (np.float16 if dtype == np.float16 else np.float32)
    np.testing.assert_array_equal(found, rows[[2, 0]].astype(found.dtype))


def test_a_map_is_opened_anew_in_another_process(tmp_path):
    rows = write_precomp(tmp_path, "train", 400, shape=(36, 64))
    split = Dataset(tmp_path).split("train")
    sent = pickle.dumps(split.records.regions)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent).read([399])[0], rows[399])


def test_pages_of_the_map_are_let_go(tmp_path, monkeypatch):
    path = tmp_path / "big.npy"
    np.lib.format.open_memmap(path, "w+", np.float32, (600, 36, 2048))[:] = 1  # 177 MB
    monkeypatch.setattr(precomputed, "MAPPED_BYTES", 2**24)
    regions = precomputed.RegionFile(path)

    def resident():
        with open("/proc/self/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Rss"))

    before, most = resident(), 0
    for row in range(0, 600, 20):
        regions.read(range(row, row + 20))
        most = max(most, resident() - before)
    assert most < 80_000  # kB


def changed(change):
    """A function that changes the array `train_ims.npy`."""

    def edit(root):
        path = root / "train_ims.npy"
        np.save(path, change(np.load(path)))

    return edit


def put(value):
    def change(x):
        x[3, 1, 2] = value
        return x

    return changed(change)


def pickled(root):
    np.save(root / "train_ims.npy", np.array([{"a": 1}] * 6, object), allow_pickle=True)


def raw_pickle(root):
    (root / "train_ims.npy").write_bytes(pickle.dumps([1, 2, 3]))


def cut(root):
    path = root / "train_ims.npy"
    path.write_bytes(path.read_bytes()[:-8])


def archive(root):
    with (root / "train_ims.npy").open("wb") as file:
        np.savez(file, x=np.zeros((6, 3, 4)))


def lines(name, text):
    return lambda root: (root / name).write_bytes(text)


def read_all(root):
    split = Dataset(root).split("train")
    return split.records.read(split.record_ids)


def complaint(root) -> str:
    """What our own error says; the path where there is none. Any other exception goes through."""
    try:
        read_all(root)
    except DataError as e:
        return str(e)
    return str(root)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put(np.nan), r"train_ims.npy: row 3 has NaN or inf"),
        (put(np.inf), r"train_ims.npy: row 3 has NaN or inf"),
        (put(-np.inf), r"train_ims.npy: row 3 has NaN or inf"),
        (
            changed(lambda x: x[:5]),
            r"train_ims.npy has 5 rows, train_caps.txt 30 captions; there must be five captions",
        ),
        (changed(lambda x: x[:, 0, 0]), r"the shape \(6,\) is neither"),
        (changed(lambda x: x.astype(str)), r"expected numbers, found <U"),
        (changed(lambda x: x[:0]), r"the shape \(0, 3, 4\) is neither"),
        (pickled, r"train_ims.npy: not a NumPy array of numbers .* pickles, which are refused"),
        (raw_pickle, r"train_ims.npy: not a NumPy array of numbers .* pickles, which are refused"),
        (cut, r"train_ims.npy: not a NumPy array"),
        (archive, r"train_ims.npy: expected numbers, found an archive"),
        (lines("train_ims.npy", b""), r"train_ims.npy: not a NumPy array"),
        (lines("train_caps.txt", b"one\n\nthree\n"), r"train_caps.txt:2: empty caption"),
        (lines("train_caps.txt", b"caf\xe9\n" * 30), r"train_caps.txt: not UTF-8 at byte 3"),
        (changed(np.asfortranarray), r"train_ims.npy: in Fortran order"),
        (lambda root: (root / "train_ims.npy").rename(root / "val_ims.npy"), r"name the files of val dev_ims.npy"),
        (lines("train_ids.txt", b"1\n2\n"), r"train_ids.txt: 2 ids, for 6 rows and 30 captions"),
        (lambda root: (root / "train_caps.txt").unlink(), r"train_caps.txt: no such file"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, edit, message):
    write_precomp(tmp_path, "train", 6)
    edit(tmp_path)
    with pytest.raises(DataError, match=message):
        read_all(tmp_path)


def test_large_numbers_are_finite(tmp_path):
    write_precomp(tmp_path, "train", 6)
    put(3e38)(tmp_path)  # its square is not
    split = Dataset(tmp_path).split("train")
    assert split.records.read(split.record_ids).max() == np.float32(3e38)


def test_repeated_rows_that_are_not_finite_are_one_image_all_the_same(tmp_path):
    write_precomp(tmp_path, "train", 6, repeated=True)
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


def test_images_whose_regions_are_not_finite_can_be_left_out(tmp_path):
    write_precomp(tmp_path, "train", 6)
    put(np.nan)(tmp_path)
    split = Dataset(tmp_path, skip_undecodable=True).split("train")
    assert (split.num_images, split.num_captions, split.skipped) == (5, 25, ["3"])
    assert split.record(3)["captions"][0] == "A dog number 0 of train 4."
    assert np.isfinite(split.records.read(split.record_ids)).all()


SHAPES = st.lists(st.integers(-1, 10**25) | st.booleans(), max_size=4).map(tuple)
# Beginnings of .npy files, with anything where the description of the array stands.
HEADERS = (
    st.text(max_size=60)
    | st.builds(
        lambda shape, d: f"{{'descr': '{d}', 'fortran_order': False, 'shape': {shape}}}", SHAPES, st.text(max_size=4)
    )
).map(lambda text: b"\x93NUMPY\x01\x00" + len(text.encode()).to_bytes(2, "little") + text.encode() + bytes(48))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | HEADERS, st.sampled_from(["ims.npy", "caps.txt", "ids.txt"]))
def test_any_file_gives_a_split_or_our_own_error(tmp_path, data, name):
    write_precomp(tmp_path, "train", 6)
    (tmp_path / f"train_{name}").write_bytes(data)
    assert str(tmp_path) in complaint(tmp_path)


def test_regions_train_evaluate_and_refuse_another_width(tmp_path, command):
    data, run = tmp_path / "f30k_precomp", tmp_path / "run"
    for split, images in (("train", 20), ("dev", 6), ("test", 6)):
        write_precomp(data, split, images, repeated=split == "train", shape=(5, 8))
    options = ("--config=configs/flickr8k.py:smoke", f"--config.data.dir={data}", f"--workdir={run}")
    refused = command("train.py", *options, check=False)
    assert "image.arch=vit takes images, but the data set has precomputed regions; set" in refused.stderr
    options += ("--config.image.arch=regions", "--config.image.regions.projection=mlp", "--config.image.pooling=gpo")
    options += ("--config.augment.region_dropout=0.2", "--config.augment.word_noise=0.2")
    text = command("train.py", *options, "--config.train.steps=2").stdout
    assert "training a tokenizer on the 100 training captions" in text
    assert "train 20 images, 100 captions; val 6, 30" in text
    assert "val: 6 images, 30 captions (5 an image)" in command("eval.py", f"--workdir={run}", "--split=dev").stdout
    report = json.loads((run / "eval" / "val" / "metrics.json").read_text())
    assert report["config"]["image"]["regions"]["width"] == 8
    other = tmp_path / "other"
    write_precomp(other, "test", 6, shape=(5, 9))
    refused = command("eval.py", f"--workdir={run}", f"--data_dir={other}", check=False)
    assert "error: the data set's regions are 9 wide, image.regions.width is 8" in refused.stderr
    options += (f"--config.data.dir={other}",)
    for split in ("train", "dev"):
        write_precomp(other, split, 6, shape=(5, 9))
    refused = command("train.py", *options, "--config.train.batch_size=8", "--config.train.steps=4", check=False)
    assert "image.regions.width: 8 there, 9 here" in refused.stderr


def test_towers_and_data_that_do_not_fit_are_refused_at_the_start(tmp_path, prepared, towers, command):
    regions = flickr30k.get_config("image=regions").copy_and_resolve_references().unlock()
    for split, width in (("train", 8), ("dev", 7)):
        write_precomp(tmp_path / "x", split, 6, shape=(5, width))
    data = Dataset(tmp_path / "x")
    config = fill_data_widths(regions, data.split("train"))
    assert config.image.regions.width == 8
    with pytest.raises(ConfigError, match=r"regions are 7 wide, image.regions.width is 8"):
        fill_data_widths(config, data.split("dev"))
    with pytest.raises(ConfigError, match=r"image.arch=regions takes regions, but the data set has images"):
        fill_data_widths(regions, Dataset(prepared).split("train"))
    regions.image.pretrained = "somewhere"
    with pytest.raises(ConfigError, match=r"image.pretrained=somewhere is an image tower, but image.arch=regions"):
        check_config(regions, MODEL_CHOICES | losses.LOSS_CHOICES)
    options = ("--config=configs/flickr8k.py", f"--config.data.dir={tmp_path / 'x'}", f"--out={tmp_path / 'out'}")
    refused = command(
        "-m mefn_jax.precompute", *options, f"--config.image.pretrained={towers / 'vit'}", "--splits=train", check=False
    )
    assert "holds precomputed regions; an image tower needs images" in refused.stderr
    assert not list((tmp_path / "out").iterdir())
