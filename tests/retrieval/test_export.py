"""An exported index: what another engine reads is what the index has, and nothing of others is lost."""

import json
import os

import numpy as np
import pytest
from commands import refusal
from pyarrow import parquet

from mefn_jax.errors import ConfigError
from mefn_jax.retrieval import export
from mefn_jax.retrieval.coarse import CoarseSearch
from mefn_jax.retrieval.export import export_index
from mefn_jax.retrieval.index import open_index
from mefn_jax.retrieval.index_files import ENCODED, UNDECODABLE, GrowingIndex, encode_names
from mefn_jax.runtime.sharding import make_mesh

CHECKPOINT = {"workdir": "run", "step": 2, "parameters": "digest", "tokenizer": "digest"}


@pytest.fixture
def index(tmp_path):
    """An index of 300 images of a dual encoder, 20 of which cannot be decoded."""
    names = [f"{k:03}.jpg" for k in range(298)] + ["\N{SNOWMAN}.jpg", os.fsdecode(b"caf\xe9.jpg")]
    growing = GrowingIndex(tmp_path / "index", names, CHECKPOINT, "/photos")
    growing.path.mkdir()
    (growing.path / "images.json").write_bytes(encode_names(names))
    rng = np.random.default_rng(0)
    growing.write_rows(np.arange(300), {"embeddings": rng.standard_normal((300, 9)).astype(np.float32)})
    growing.states[:, 2] = ENCODED
    growing.states[rng.choice(298, 20, replace=False), 2] = UNDECODABLE
    growing.save()
    return growing.path


def read_rows(out):
    """The paths of an export in order, read with pyarrow alone."""
    files = sorted((out / "metadata").iterdir())
    tables = [parquet.read_table(file) for file in files]
    assert all(table.column_names == ["image_path", "caption"] for table in tables)
    assert all(set(table["caption"].to_pylist()) == {""} for table in tables)
    return [path for table in tables for path in table["image_path"].to_pylist()]


def expected_paths(opened):
    """The paths of the images that could be decoded."""
    names = [opened.names[k] for k in np.flatnonzero(opened.readable)]
    return [f"/photos/{name}" for name in names[:-1]] + ["/photos/caf\\xe9.jpg"]


def test_export_to_parquet_has_every_readable_image(index, tmp_path, monkeypatch, capsys):
    """In files of at most 25 rows, which are 12 of each kind."""
    monkeypatch.setattr(export, "ROWS_OF_FILE", 25)
    monkeypatch.setattr(export, "EXPORTED_AT_ONCE", 10)
    out = tmp_path / "out"
    export_index(index, "parquet", out)
    opened = open_index(index)
    assert read_rows(out) == expected_paths(opened)
    files = sorted((out / "img_emb").iterdir())
    assert [file.name for file in files] == [f"img_emb_{k:02}.npy" for k in range(12)]
    np.testing.assert_array_equal(np.concatenate(list(map(np.load, files))), opened.embeddings[opened.readable])
    description = json.loads((out / "export.json").read_text())
    assert (description["images"], description["width"], description["checkpoint"]) == (280, 9, CHECKPOINT)
    printed = capsys.readouterr().out
    assert f"wrote {out}: 280 images, vectors of width 9" in printed
    assert "the paths of 1 images are not UTF-8" in printed
    assert sorted(os.listdir(out)) == ["export.json", "img_emb", "metadata"]


def test_top_ten_of_faiss_equal_the_nearest_of_the_index(index, tmp_path, command):
    """Through the command, in place of an export of the other kind."""
    faiss, out = pytest.importorskip("faiss"), tmp_path / "out"
    for kind in ("parquet", "faiss"):
        command("eval.py", "index", f"--index={index}", f"--export={kind}", f"--out={out}")
    assert sorted(os.listdir(out)) == ["export.json", "image.index", "metadata"]
    opened, queries = open_index(index), np.random.default_rng(1).standard_normal((50, 9)).astype(np.float32)
    products, rows = faiss.read_index(str(out / "image.index")).search(queries, 10)
    positions, expected = CoarseSearch(opened.embeddings, make_mesh(), opened.readable).find(queries, 10)
    np.testing.assert_array_equal(np.flatnonzero(opened.readable)[rows], positions)
    np.testing.assert_allclose(products, expected, atol=1e-5)
    assert read_rows(out) == expected_paths(opened)


def test_export_refuses_what_it_cannot_do(index, tmp_path, command, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"own is not empty and holds no export\.json"):
        export_index(index, "parquet", tmp_path / "own")
    with pytest.raises(ConfigError, match=r"index is not empty and holds no export\.json"):
        export_index(index, "parquet", index)
    monkeypatch.setitem(export.EXPORTS, "faiss", (export.write_faiss, "no_such_module", "faiss-cpu"))
    with pytest.raises(ConfigError, match=r"--export=faiss needs the package faiss-cpu: pip install faiss-cpu"):
        export_index(index, "faiss", tmp_path / "out")
    with pytest.raises(ConfigError, match="no index; make one"):
        export_index(tmp_path / "nowhere", "parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = f"--out={tmp_path / 'out'}"
    assert "--export is missing" in refusal(command, "eval.py", "index", f"--index={index}", out)
    assert "--images is missing" in refusal(command, "eval.py", "index", out)
    assert "give one of them" in refusal(command, "eval.py", "index", "--images=x", "--export=faiss", out)


def test_export_that_fails_leaves_the_earlier_one(index, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_index(index, "parquet", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(opened, rows, folder):
        (folder / "img_emb").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(export.EXPORTS, "parquet", (fail, "pyarrow", "pyarrow"))
    with pytest.raises(ConfigError, match=r"out: cannot be written \(No space left on device\)"):
        export_index(index, "parquet", out)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert not (out / ".export").exists()
