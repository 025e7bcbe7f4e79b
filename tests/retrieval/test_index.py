"""An index of a folder of images: interruption, damage, and mismatches."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from mefn_jax.errors import ConfigError, DataError, TrainingError
from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.retrieval import index, search
from mefn_jax.retrieval.index import build_index, open_index

CAPTION = "a red circle is left of a blue square"
NUM_IMAGES = 11  # in `folder`, besides the broken one


def test_interrupted_index_resumes_to_equal_files(runs, folder, tmp_path, monkeypatch):
    model, params, made_by = index.load_model(TrainedRun(runs["mefn"], "latest"))
    build_index(model, params, made_by, folder, tmp_path / "whole")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / ".images.json.new").write_text('["hal')  # the leftover of a command that was killed at once
    monkeypatch.setattr(index, "SAVE_SECONDS", 0.0)
    load_batches = index.load_batches

    def stop_after_one(*args):
        for number, batch in enumerate(load_batches(*args)):
            if number == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(index, "load_batches", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        build_index(model, params, made_by, folder, tmp_path / "stopped")
    with pytest.raises(ConfigError, match=r"8 of 12 images are encoded; run python eval\.py index again"):
        open_index(tmp_path / "stopped", made_by)
    monkeypatch.setattr(index, "load_batches", load_batches)
    build_index(model, params, made_by, folder, tmp_path / "stopped")
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes(), path.name


def test_index_and_search_refuse_inputs_that_do_not_match(runs, folder, tmp_path):
    built = tmp_path / "index"
    index.index_images(TrainedRun(runs["mefn"], "latest"), folder, built)
    with pytest.raises(
        ConfigError, match=rf"was made by step 2 of {runs['mefn']}, which is not step 2 of {runs['vsepp']}"
    ):
        search.search_images(TrainedRun(runs["vsepp"], "latest"), built, CAPTION, 1)
    with pytest.raises(ConfigError, match="was made by step 2"):
        index.index_images(TrainedRun(runs["vsepp"], "latest"), folder, built)
    shutil.copytree(folder, tmp_path / "more")
    with pytest.raises(ConfigError, match="is of other images"):
        index.index_images(TrainedRun(runs["mefn"], "latest"), tmp_path / "more", built)
    with pytest.raises(ConfigError, match="no index; make one"):
        search.search_images(TrainedRun(runs["mefn"], "latest"), tmp_path / "nowhere", CAPTION, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in it"):
        index.index_images(TrainedRun(runs["mefn"], "latest"), tmp_path / "empty", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"is not empty and holds no index\.json"):
        index.index_images(TrainedRun(runs["mefn"], "latest"), folder, tmp_path / "more")
    for caption in ("  ", "!!!", "..."):
        with pytest.raises(ConfigError, match="a caption without words"):
            search.search_images(TrainedRun(runs["mefn"], "latest"), built, caption, 1)
    with pytest.raises(ConfigError, match="--caption=caf\ufffd red: not UTF-8"):
        search.search_images(TrainedRun(runs["mefn"], "latest"), built, os.fsdecode(b"caf\xe9 red"), 1)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "images.json").write_text('["mine"]')
    with pytest.raises(ConfigError, match=r"is not empty and holds no index\.json"):
        index.index_images(TrainedRun(runs["mefn"], "latest"), folder, tmp_path / "own")
    assert (tmp_path / "own" / "images.json").read_text() == '["mine"]'
    (tmp_path / "x.png").mkdir()
    for out, message in (("x.doc", r"give a \.png or \.jpg file"), ("x.psd", "give a"), ("x.png", "is a directory")):
        with pytest.raises(ConfigError, match=message):
            search.search_images(TrainedRun(runs["mefn"], "latest"), built, CAPTION, 1, out=str(tmp_path / out))
    for arguments in ((folder, "gs://bucket/index"), ("gs://bucket/images", tmp_path / "other")):
        with pytest.raises(ConfigError, match="must be in a local or mounted directory"):
            index.index_images(TrainedRun(runs["mefn"], "latest"), *arguments)


def test_open_index_refuses_other_parameters_of_same_step(runs, folder, tmp_path):
    model, params, made_by = index.load_model(TrainedRun(runs["vsepp"], "latest"))
    build_index(model, params, made_by, folder, tmp_path / "index")
    with pytest.raises(ConfigError, match=r"was made by step 2 of .*, with other parameters \(trained again"):
        open_index(tmp_path / "index", made_by | {"parameters": "others"})


def test_index_refuses_folder_of_broken_images(runs, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match="no image in it can be decoded"):
        index.index_images(TrainedRun(runs["vsepp"], "latest"), tmp_path / "images", tmp_path / "index")
    assert "left out 1 images" in capsys.readouterr().out
    with pytest.raises(DataError, match="no image in it can be decoded"):  # the second call refuses it, too
        index.index_images(TrainedRun(runs["vsepp"], "latest"), tmp_path / "images", tmp_path / "index")
    with pytest.raises(DataError, match="none of its images could be decoded"):
        search.search_images(TrainedRun(runs["vsepp"], "latest"), tmp_path / "index", CAPTION, 1)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("embeddings.npy", None, "cannot be read as an array"),
        ("embeddings.npy", b"", "cannot be read as an array"),
        ("fragments.npy", b"\x93NUMPY\x01\x00v", "cannot be read as an array"),
        ("mask.npy", None, "cannot be read as an array"),
        ("images.json", b"[]", "is not a list of 12 names"),
        ("images.json", None, "no such file"),
        ("index.json", b"{}", r"was written by an earlier version \(format 0\), which .*; make the index again"),
        ("index.json", b'{"format": 9}', "has format 9, written by a newer version"),
        ("index.json", b'{"format": "1"}', "expected an object whose 'format' is a number"),
        ("index.json", b"[]", "expected an object whose 'format' is a number"),
        ("index.json", b'{"format": 1}', "the key 'checkpoint' is missing"),
        ("index.json", b"{", "not JSON"),
    ],
)
def test_open_index_names_damaged_file(file, content, message, runs, folder, tmp_path):
    model, params, made_by = index.load_model(TrainedRun(runs["mefn"], "latest"))
    build_index(model, params, made_by, folder, tmp_path / "index")
    path = tmp_path / "index" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        open_index(tmp_path / "index", made_by)
    assert file in str(refused.value)


def test_index_refuses_values_that_are_not_finite(runs, folder, tmp_path):
    model, params, made_by = index.load_model(TrainedRun(runs["vsepp"], "latest"))
    broken = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(TrainingError, match=r"0\.png: its features are not finite"):
        build_index(model, broken, made_by, folder, tmp_path / "index")
    with pytest.raises(TrainingError, match=r"b\.png: its score is not finite"):
        index.require_finite(np.array([1.0, np.inf]), ["a.png", "b.png"])


def test_index_records_checkpoint_and_counts(runs, folder, tmp_path):
    index.index_images(TrainedRun(runs["mefn"], "latest"), folder, tmp_path / "index")
    metadata = json.loads((tmp_path / "index" / "index.json").read_text())
    assert metadata["checkpoint"]["workdir"] == str(runs["mefn"])
    assert (metadata["images"], metadata["done"], metadata["skipped"]) == (
        NUM_IMAGES + 1,
        NUM_IMAGES + 1,
        ["broken.jpg"],
    )
