"""`prepare`: the data set that it writes, failures, and drawn scenes."""

import fcntl
import json
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from commands import ROOT, environment
from sample_data import PREPARE_OPTIONS, write_flickr8k

from configs import shapes
from mefn_jax.data import tokenizer as tok
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.prepare import open_drawn_scenes, prepare
from mefn_jax.errors import DataError


def test_prepare_keeps_image_bytes_and_order(prepared):
    dataset = Dataset(prepared)
    split = dataset.split("train")
    folder = prepared.parent / "source"
    assert (split.num_images, split.num_captions) == (40, 200)
    for k in (0, 7, 39):
        record = split.record(k)
        assert record["image_id"] == f"train_{k}.jpg"
        assert record["image"] == (folder / "Images" / f"train_{k}.jpg").read_bytes()
        assert len(record["captions"]) == 5
        assert record["scene"] is None
    assert dataset.split("dev").name == "val"
    assert (
        tfds.builder_from_directory(str(prepared)).info.file_format == tfds.core.file_adapters.FileFormat.ARRAY_RECORD
    )


def test_failed_prepare_leaves_nothing_behind(flickr8k, tmp_path, monkeypatch):
    out = tmp_path / "out" / "data"
    (flickr8k / "Images" / "dev_5.jpg").unlink()
    with pytest.raises(DataError, match=r"dev_5.jpg"):
        prepare("flickr8k", flickr8k, out, **PREPARE_OPTIONS)
    write_flickr8k(tmp_path / "again")
    monkeypatch.setattr(tok, "train_tokenizer", lambda *a: 1 / 0)  # fails late, when the records are written
    with pytest.raises(ZeroDivisionError):
        prepare("flickr8k", tmp_path / "again", out, **PREPARE_OPTIONS)
    assert list(out.parent.iterdir()) == []


KILLED = """
import sys, time
from mefn_jax.data import prepare, tokenizer
def wait(*_):
    print("written", flush=True)
    time.sleep(60)
tokenizer.train_tokenizer = wait
prepare.prepare("flickr8k", sys.argv[1], sys.argv[2], vocab_size=300, lower_case=True, punctuation="keep",
                scenes=None, seed=0)
"""


def test_killed_prepare_leaves_nothing_readable_and_starts_over(flickr8k, tmp_path, cache):
    out = tmp_path / "out" / "data"
    words = [sys.executable, "-c", KILLED, flickr8k, out]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(cache))
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.communicate()
    leftovers = list(out.parent.iterdir())
    assert [p.name.startswith(".data.incomplete-") for p in leftovers] == [True]
    other_folder = out.parent / ".data.incomplete-other"
    other_folder.mkdir()
    lock = (other_folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="no such directory"):
        Dataset(out)
    prepare("flickr8k", flickr8k, out, **PREPARE_OPTIONS)
    assert set(out.parent.iterdir()) == {out, other_folder}  # a folder that another process has locked stays
    assert Dataset(out).split("train").num_images == 12
    lock.close()


def test_prepare_does_not_overwrite_files(flickr8k, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(DataError, match="not empty; choose another --out"):
        prepare("flickr8k", flickr8k, tmp_path / "out", **PREPARE_OPTIONS)
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_open_drawn_scenes_keeps_images_and_captions(cache, monkeypatch):
    monkeypatch.setenv("MEFN_CACHE", str(cache / "data"))
    c = shapes.get_config("smoke").data
    directory = open_drawn_scenes(c.scenes, c.scene_seed)
    records = tfds.builder_from_directory(str(directory)).as_data_source("test")
    assert records[0]["image"].shape == (96, 96, 3)
    assert len(json.loads(records[0]["scene"])["captions"]) == 5


def test_open_drawn_scenes_names_damaged_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("MEFN_CACHE", str(tmp_path))
    directory = open_drawn_scenes((2, 1, 1), 0)
    assert open_drawn_scenes((2, 1, 1), 0) == directory
    (directory / tok.TOKENIZER_FILE).write_text("{")
    with pytest.raises(DataError) as error:
        _ = Dataset(directory).tokenizer_json
    assert str(error.value).startswith(f"{directory}: tokenizer.json")
    (directory / tok.TOKENIZER_FILE).unlink()
    with pytest.raises(DataError, match=f"{directory}: drawn scenes without tokenizer.json; remove this directory"):
        open_drawn_scenes((2, 1, 1), 0)
