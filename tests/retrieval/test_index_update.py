"""An index follows its folder: what is new or changed is encoded, what is gone is dropped, and nothing else is done."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mefn_jax.errors import ConfigError, DataError, UserError
from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.retrieval import index, index_files
from mefn_jax.retrieval.image_folder import find_images
from mefn_jax.retrieval.index import build_index, open_index


def save_image(path, seed, kind=None):
    """Writes a noise image of 60 x 40 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path, kind)


@pytest.fixture(scope="module")
def made_by(runs):
    """A model of fragments, its parameters, and what identifies its checkpoint."""
    return index.load_model(TrainedRun(runs["mefn"], "latest"))


@pytest.fixture
def photos(tmp_path):
    """A folder of ten images and one that is broken."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for k in range(10):
        save_image(folder / f"{'below/' if k % 2 else ''}{k}.png", k)
    (folder / "broken.jpg").write_bytes(b"nothing")
    return folder


@pytest.fixture
def encoded(monkeypatch):
    """The names of the images that `index` reads, in order; `stop_after` interrupts it after so many batches."""

    class Names(list):
        stop_after = None

    names, load_batches = Names(), index.load_batches

    def load(folder, todo, resize, size, config):
        for number, batch in enumerate(load_batches(folder, todo, resize, size, config)):
            if number == names.stop_after:
                raise KeyboardInterrupt
            names.extend(todo[batch[0] : batch[0] + len(batch[1])])
            yield batch

    monkeypatch.setattr(index, "load_batches", load)
    monkeypatch.setattr(index, "SAVE_SECONDS", 0.0)
    return names


def change_folder(photos):
    """Replaces two images, one of them in a file of the same size, adds two and removes two."""
    status = (photos / "0.png").stat()
    save_image(photos / "0.png", 100)
    data = (photos / "0.png").read_bytes()[: status.st_size].ljust(status.st_size, b"\0")
    (photos / "0.png").write_bytes(data)
    save_image(photos / "below" / "1.png", 101)
    save_image(photos / "a new one.png", 102)
    save_image(photos / "zz.png", 103)
    (photos / "2.png").unlink()
    (photos / "broken.jpg").unlink()
    return ["0.png", "a new one.png", "below/1.png", "zz.png"]


def assert_equal_to_fresh_index(made_by, photos, built, fresh):
    """Checks that an index has the rows of one that is made anew, in its order, and no other files."""
    build_index(*made_by, photos, fresh)
    assert sorted(os.listdir(built)) == sorted(os.listdir(fresh))
    for name in ("images.json", "files.npy", "index.json"):
        assert (built / name).read_bytes() == (fresh / name).read_bytes(), name
    a, b = (open_index(path, made_by[2]) for path in (built, fresh))
    assert a.readable.tolist() == b.readable.tolist()
    for name in index_files.ARRAYS:
        x, y = getattr(a, name)[a.readable], getattr(b, name)[a.readable]
        np.testing.assert_allclose(np.float32(x), np.float32(y), atol=1e-6, err_msg=name)


def test_index_encodes_only_what_is_new_or_changed(made_by, photos, tmp_path, encoded, capsys):
    built = tmp_path / "index"
    build_index(*made_by, photos, built)
    assert encoded == find_images(photos).names
    encoded.clear()
    build_index(*made_by, photos, built)
    assert encoded == []
    assert "all images are encoded already" in capsys.readouterr().out
    expected = change_folder(photos)
    build_index(*made_by, photos, built)
    assert encoded == expected
    assert f"{built}: 7 images are as they were, 4 are new or have changed, 2 are gone" in capsys.readouterr().out
    assert_equal_to_fresh_index(made_by, photos, built, tmp_path / "fresh")
    # Only fewer images: nothing is encoded.
    encoded.clear()
    (photos / "zz.png").unlink()
    build_index(*made_by, photos, built)
    assert encoded == []
    shutil.rmtree(tmp_path / "fresh")
    assert_equal_to_fresh_index(made_by, photos, built, tmp_path / "fresh")


def test_index_stays_searchable_until_a_stopped_update_is_complete(made_by, photos, tmp_path, encoded):
    built = tmp_path / "index"
    build_index(*made_by, photos, built)
    old = np.array(open_index(built, made_by[2]).embeddings)
    for k in range(12):
        save_image(photos / f"more{k:02}.png", 200 + k)
    expected = change_folder(photos)
    encoded.clear()
    encoded.stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        build_index(*made_by, photos, built)
    first = list(encoded)
    assert 0 < len(first) < len(expected) + 12
    np.testing.assert_array_equal(open_index(built, made_by[2]).embeddings, old)
    # The folder changes again before the update goes on: what was encoded is kept.
    save_image(photos / "last.png", 300)
    with pytest.raises(KeyboardInterrupt):
        build_index(*made_by, photos, built)
    encoded.stop_after = None
    build_index(*made_by, photos, built)
    assert len(encoded) == len(set(encoded)) == len(expected) + 13
    assert_equal_to_fresh_index(made_by, photos, built, tmp_path / "fresh")


def test_first_index_that_was_stopped_goes_on_in_a_folder_that_has_grown(made_by, photos, tmp_path, encoded):
    built, encoded.stop_after = tmp_path / "index", 1
    with pytest.raises(KeyboardInterrupt):
        build_index(*made_by, photos, built)
    save_image(photos / "a.png", 400)
    encoded.stop_after = None
    build_index(*made_by, photos, built)
    assert sorted(encoded) == find_images(photos).names
    assert_equal_to_fresh_index(made_by, photos, built, tmp_path / "fresh")


@pytest.mark.parametrize("moved", [0, 1, 3, 6])
def test_replacement_that_was_stopped_is_finished(moved, made_by, photos, tmp_path, monkeypatch):
    built = tmp_path / "index"
    build_index(*made_by, photos, built)
    change_folder(photos)
    replace = os.replace
    finish = index_files.finish_commit
    monkeypatch.setattr(index_files, "finish_commit", lambda out: None)
    build_index(*made_by, photos, built)  # everything but the replacement
    monkeypatch.setattr(index_files, "finish_commit", finish)
    count = iter(range(100))

    def stop_after(source, target):
        if next(count) >= moved:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_after)
    with pytest.raises(KeyboardInterrupt):
        finish(built)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ConfigError, match=r"an update of it was stopped; run python eval\.py index again"):
        open_index(built, made_by[2])
    build_index(*made_by, photos, built)
    assert_equal_to_fresh_index(made_by, photos, built, tmp_path / "fresh")


def test_index_of_format_1_is_searched_and_then_made_anew(made_by, photos, tmp_path, encoded):
    built = tmp_path / "index"
    build_index(*made_by, photos, built)
    metadata = json.loads((built / "index.json").read_text())
    del metadata["checkpoint"]["tokenizer"]
    (built / "index.json").write_text(json.dumps(metadata | {"format": 1}))
    (built / "files.npy").unlink()
    open_index(built, made_by[2])
    encoded.clear()
    build_index(*made_by, photos, built)
    assert encoded == find_images(photos).names
    assert_equal_to_fresh_index(made_by, photos, built, tmp_path / "fresh")


def test_index_refuses_another_tokenizer(made_by, photos, tmp_path):
    build_index(*made_by, photos, tmp_path / "index")
    with pytest.raises(ConfigError, match=r"the index .* was made by step 2 of"):
        open_index(tmp_path / "index", made_by[2] | {"tokenizer": "another"})


def test_images_are_found_by_content_and_through_links(tmp_path, capsys):
    folder, other = tmp_path / "photos", tmp_path / "other"
    (folder / "inner").mkdir(parents=True)
    other.mkdir()
    kinds = {"a.jpg": None, "b.jfif": "JPEG", "c.JPE": "JPEG", "no suffix": "JPEG", "wrong.txt": "PNG", "d.webp": None}
    kinds |= {"inner/e.tiff": None, "f.backup": "GIF", "g.bmp": None}
    kinds |= {f"h.{kind}": None for kind in ("avif", "jp2") if f".{kind}" in Image.registered_extensions()}
    for k, (name, kind) in enumerate(kinds.items()):
        save_image(folder / name, k, kind)
    save_image(other / "linked.png", 50)
    (folder / "link").symlink_to(other)
    (folder / "linked file.png").symlink_to(other / "linked.png")
    (other / "back").symlink_to(folder)  # a circle
    (folder / "up").symlink_to(tmp_path)
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.jpg")
    for name, content in (
        ("notes.txt", b"text"),
        ("data.npy", b"\x93NUMPY"),
        ("empty", b""),
        ("page.pdf", b"%PDF-1.4"),
    ):
        (folder / name).write_bytes(content)
    found = find_images(folder)
    assert found.names == sorted([*kinds, "link/linked.png", "linked file.png"])
    assert found.files[:, 0].tolist() == [(folder / name).stat().st_size for name in found.names]
    found.print_left_out()
    printed = capsys.readouterr().out
    assert "left out 4 files that are no images: data.npy, empty, notes.txt, page.pdf" in printed
    assert "left out 2 files or folders that cannot be read: gone.jpg, pipe.jpg" in printed
    assert "left out 2 links to folders whose images are taken already: link/back, up" in printed


def test_index_inside_its_own_folder_does_not_list_itself(made_by, photos, capsys):
    build_index(*made_by, photos, photos / "index")
    build_index(*made_by, photos, photos / "index")
    printed = capsys.readouterr().out
    assert "no images" not in printed
    assert "all images are encoded already" in printed


JSON = st.none() | st.integers(-3, 20) | st.text(max_size=4) | st.lists(st.text(max_size=4) | st.none(), max_size=3)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["format", *index_files.METADATA_TYPES]),
    JSON | st.dictionaries(st.sampled_from(["parameters", "workdir", "tokenizer"]), JSON),
    st.sampled_from(["index.json", "images.json"]),
    st.integers(0, 300),
    st.binary(max_size=4),
)
def test_damaged_index_raises_no_error_but_ours(stored_index, key, value, file, start, data):
    path, metadata, contents = stored_index
    (path / "index.json").write_text(json.dumps(metadata | {key: value}))
    check_opens_or_refuses(path)
    for name, content in contents.items():
        (path / name).write_bytes(content)
    content = contents[file]
    (path / file).write_bytes(content[:start] + data + content[start + len(data) :])
    check_opens_or_refuses(path)
    (path / file).write_bytes(content)


def check_opens_or_refuses(path):
    try:
        open_index(path, {"workdir": "run", "step": 2, "parameters": "digest", "tokenizer": "digest"})
    except UserError as error:
        message = str(error)
    else:
        message = str(path)
    assert str(path) in message


@pytest.fixture
def stored_index(tmp_path):
    """An index of three images of a dual encoder, its metadata, and the content of its JSON files."""
    growing = index_files.GrowingIndex(tmp_path, ["a", "b", "c"], {}, "photos")
    growing.checkpoint = {"workdir": "run", "step": 2, "parameters": "digest", "tokenizer": "digest"}
    (tmp_path / "images.json").write_bytes(index_files.encode_names(growing.names))
    growing.write_rows(np.arange(3), {"embeddings": np.ones((3, 4), np.float32)})
    growing.states[:, 2] = 1
    growing.save()
    contents = {name: (tmp_path / name).read_bytes() for name in ("index.json", "images.json")}
    return tmp_path, json.loads(contents["index.json"]), contents


@pytest.mark.parametrize(
    ("name", "array"),
    [("embeddings", np.ones((3, 4), "U3")), ("embeddings", np.ones(3)), ("embeddings", np.ones((2, 4), np.float32))],
)
def test_open_index_refuses_arrays_of_other_shapes_and_types(stored_index, name, array):
    path, *_ = stored_index
    np.save(path / f"{name}.npy", array)
    with pytest.raises(DataError, match=rf"{name}\.npy: expected"):
        open_index(path)
