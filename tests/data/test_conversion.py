"""Conversion of shards: the files that it writes, whatever the source, the processes and the interruptions."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, environment
from PIL import Image
from sample_data import PREPARE_OPTIONS, write_formats, write_tar

from mefn_jax.data import conversion
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.prepare import prepare
from mefn_jax.data.sources.shard import Shard
from mefn_jax.errors import DamagedEntriesError, DataError

NEW_SOURCES = ("parquet", "webdataset", "imagefolder")


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """The same data in four formats, and the data set that was made of the table."""
    root = tmp_path_factory.mktemp("formats")
    folders = write_formats(root)
    prepare("table", folders["table"], root / "expected", **PREPARE_OPTIONS)
    return folders, root / "expected"


def read_examples(directory) -> dict[str, list[bytes]]:
    """Returns the examples of the splits of a data set, as they are stored."""
    from array_record.python.array_record_module import ArrayRecordReader

    examples = {}
    for path in sorted(directory.glob("*.array_record-*")):
        reader = ArrayRecordReader(str(path))
        records = examples.setdefault(path.name.split(".")[0], [])
        records += reader.read(list(range(reader.num_records())))
    return examples


def read_all(directory) -> dict[str, bytes]:
    """Returns the content of all files below a directory, by their relative names."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def metadata_without_source(directory) -> dict:
    metadata = json.loads((directory / "metadata.json").read_text())
    return {key: value for key, value in metadata.items() if key != "source"}


@pytest.mark.parametrize("source", NEW_SOURCES)
def test_examples_of_every_source_equal_those_of_the_table(source, formats, tmp_path):
    folders, expected = formats
    prepare(source, folders[source], tmp_path / "out", **PREPARE_OPTIONS)
    assert read_examples(tmp_path / "out") == read_examples(expected)
    assert sum(map(len, read_examples(expected).values())) == 16
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (expected / "tokenizer.json").read_bytes()
    assert metadata_without_source(tmp_path / "out") == metadata_without_source(expected)
    assert not (tmp_path / "out" / conversion.LEFT_OUT_FILE).exists()
    split = Dataset(tmp_path / "out").split("val")
    assert (split.num_images, split.num_captions, split.record(0)["image_id"]) == (4, 8, "val/00000/0000.jpg")


def test_example_files_equal_in_any_number_of_processes(formats, tmp_path, command):
    """The fields of a stored example would stand in another order in each process, if they were not sorted."""
    folders, _ = formats
    words = ["--source=webdataset", f"--path={folders['webdataset']}", f"--out={tmp_path / 'there'}", "--workers=2"]
    command("-m mefn_jax.data.prepare", *words, "--vocab_size=300")
    prepare("webdataset", folders["webdataset"], tmp_path / "here", **PREPARE_OPTIONS)
    assert read_all(tmp_path / "there") == read_all(tmp_path / "here")


KILLED = """
import sys, time
from mefn_jax.data import conversion, prepare
convert, done = conversion.convert_shard, []
def wait_in_third_shard(shard, folder, limit, advance):
    def advance_or_wait(number):
        if len(done) == 2:
            print("two shards", flush=True)
            time.sleep(60)
    part = convert(shard, folder, limit, advance_or_wait)
    done.append(part)
    return part
conversion.convert_shard = wait_in_third_shard
prepare.prepare("parquet", sys.argv[1], sys.argv[2], vocab_size=300, lower_case=True, punctuation="keep",
                scenes=None, seed=0)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_prepare_goes_on_to_the_same_files(number, formats, tmp_path, cache, monkeypatch):
    folders, _ = formats
    prepare("parquet", folders["parquet"], tmp_path / "undisturbed", **PREPARE_OPTIONS)
    out = tmp_path / "out" / "data"
    words = [sys.executable, "-c", KILLED, folders["parquet"], out]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(cache))
    assert process.stdout.readline() == "two shards\n"
    process.send_signal(number)
    process.communicate()
    converted, convert = [], conversion.convert_shard
    monkeypatch.setattr(conversion, "convert_shard", lambda shard, *a: converted.append(shard) or convert(shard, *a))
    prepare("parquet", folders["parquet"], out, **PREPARE_OPTIONS)
    assert len(converted) == 2  # of four
    assert read_all(out) == read_all(tmp_path / "undisturbed")
    assert list(out.parent.iterdir()) == [out]


def test_prepare_converts_changed_shards_again(formats, tmp_path, monkeypatch):
    """What a killed run has converted counts only while its shard, and what is kept of it, is the same."""
    shard, limit = tmp_path / "a.parquet", 1
    shard.write_bytes((formats[0]["parquet"] / "train-00000-of-00002.parquet").read_bytes())

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "join_parts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare("parquet", tmp_path, tmp_path / "out" / "a", captions_per_image=limit, **PREPARE_OPTIONS)
    assert len(list((tmp_path / "out").glob(".a.incomplete-*/parts/000000"))) == 1
    prepare("parquet", tmp_path, tmp_path / "out" / "a", captions_per_image=2, **PREPARE_OPTIONS)
    assert Dataset(tmp_path / "out" / "a").split("train").num_captions == 10
    assert len(list((tmp_path / "out").iterdir())) == 1


def damage_formats(folders) -> dict[str, list[str]]:
    """Damages two of nine training images and one shard of each format; returns what messages must name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folders["parquet"] / "train-00000-of-00002.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[1]["image"]["bytes"], rows[3]["captions"] = b"<html>", ["fine", None]
    pq.write_table(pa.Table.from_pylist(rows), path)
    path = folders["parquet"] / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    tar = folders["webdataset"] / "train" / "00000.tar"
    with tarfile.open(tar) as opened:
        members = [(member.name, opened.extractfile(member).read()) for member in opened]
    damaged = {"0000.json": b'{"captions": [1.', "0001.jpg": b"<html>"}
    write_tar(tar, [(name, damaged.get(name, data)) for name, data in members])
    tar = folders["webdataset"] / "train" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    images = folders["imagefolder"] / "train"
    (images / "00000" / "0001.jpg").write_bytes(b"<html>")
    (images / "00000" / "0003.jpg").unlink()
    return {
        "parquet": [
            "train-00000-of-00002.parquet: row 1: not an image",
            "row 3: captions[1]",
            "00001-of-00002.parquet",
        ],
        "webdataset": [
            "00000.tar: '0001': not an image",
            "00000.tar: '0000': json: not JSON",
            "00001.tar: '0005.jpg': cut",
        ],
        "imagefolder": ["0003.jpg' is not in", "0001.jpg: not an image"],
    }


@pytest.mark.parametrize("source", NEW_SOURCES)
def test_damaged_entries_are_named_and_counted(source, tmp_path):
    folders = write_formats(tmp_path)
    messages = damage_formats(folders)[source]
    out = tmp_path / "out" / "data"
    with pytest.raises(DamagedEntriesError, match=r"--skip_damaged") as error:
        prepare(source, folders[source], out, **PREPARE_OPTIONS)
    assert all(message in str(error.value) for message in messages[: 1 if source == "imagefolder" else 2])
    notes = prepare(source, folders[source], out, skip_damaged=True, **PREPARE_OPTIONS)
    (note,) = [note for note in notes if "left out" in note]
    assert f"left out {len(messages)} damaged entries, listed in left_out.txt" in note
    listed = (out / conversion.LEFT_OUT_FILE).read_text().splitlines()
    assert len(listed) == len(messages)
    assert all(any(message in line for line in listed) for message in messages)
    assert list(out.parent.iterdir()) == [out]
    assert Dataset(out).split("train").num_images == (7 if source == "imagefolder" else 3)


class Ending:
    """A reader that ends its process; it can be sent to another one."""

    def __call__(self):
        os._exit(9)


def test_a_process_that_ends_is_an_error(tmp_path):
    shards = [Shard(str(k), "train", k, Ending()) for k in range(2)]
    with pytest.raises(DataError, match="a process of --workers=2 ended"):
        conversion.convert_shards(shards, tmp_path / "parts", 0, 2, False, int)


def test_an_id_in_two_splits_is_an_error(tmp_path):
    folders = write_formats(tmp_path)
    path = folders["parquet"] / "train-00000-of-00002.parquet"
    (folders["parquet"] / "test-00000-of-00001.parquet").write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"'train/00000/000..jpg' is in the data 2 times \(test, shard 1; train"):
        prepare("parquet", folders["parquet"], tmp_path / "out", **PREPARE_OPTIONS)


def measure_memory(pid) -> int:
    """Returns the resident memory of a process and its descendants, in KB; pages that they share count in each."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return 0
    own = re.search(r"VmRSS:\s*(\d+) kB", status)
    return (int(own[1]) if own else 0) + sum(map(measure_memory, children))


@pytest.mark.slow
def test_a_hundred_thousand_pairs_fit_into_a_gigabyte(tmp_path, cache):
    """Also where a shard is one row group; the bound is for the command and its two processes together."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(out, "JPEG")
    for shard in range(4):
        names = [f"{25_000 * shard + k:06}" for k in range(25_000)]
        column = [{"bytes": out.getvalue() + name.encode(), "path": name} for name in names]
        table = pa.table({"image": column, "text": [f"a dog and w{name}" for name in names]})
        pq.write_table(table, tmp_path / f"train-{shard:05}.parquet", row_group_size=25_000)
        del column, table
    words = [sys.executable, "-m", "mefn_jax.data.prepare", "--source=parquet", f"--path={tmp_path}", "--workers=2"]
    process = subprocess.Popen([*words, f"--out={tmp_path / 'out'}"], cwd=ROOT, env=environment(cache))
    largest = 0
    while process.poll() is None:
        largest = max(largest, measure_memory(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0
    assert 10**5 < largest < 10**6
    assert Dataset(tmp_path / "out").split("train").num_images == 100_000
