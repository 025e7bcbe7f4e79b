"""What a command may write: new files and its own, in directories that exist or can be made."""

import os

import numpy as np
import pytest
from PIL import Image

from mefn_jax.aot import is_compile_report
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.results import RESULT_FILES
from mefn_jax.evaluation.run import Gallery
from mefn_jax.evaluation.score_file import check_score_file, is_score_file
from mefn_jax.reports import contact_sheet
from mefn_jax.runtime.outputs import check_output_directory, check_output_file

NPY = ("--save_scores", (".npy",), is_score_file)


def check(path):
    option, suffixes, is_own = NPY
    return check_output_file(option, path, suffixes, is_own)


def test_output_file_may_be_new_empty_or_own(tmp_path):
    for path in (tmp_path / "new.npy", tmp_path / "a" / "b" / "new.NPY", tmp_path / "empty.npy"):
        (tmp_path / "empty.npy").touch()
        assert check(path) == path
    np.save(tmp_path / "own.npy", np.zeros((2, 10), np.float32))
    assert check(tmp_path / "own.npy")
    assert sorted(os.listdir(tmp_path)) == ["empty.npy", "own.npy"]  # checking leaves nothing behind


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("thesis.tex", b"text", r"give a \.npy file"),
        ("scores", None, r"give a \.npy file"),
        ("x.npy.txt", None, r"give a \.npy file"),
        ("foreign.npy", b"text", "was not written by this command"),
        ("pickle.npy", np.array([None]), "was not written by this command"),
        ("vector.npy", np.zeros(3, np.float32), "was not written by this command"),
        ("double.npy", np.zeros((3, 3)), "was not written by this command"),
        ("folder.npy", "directory", "is a directory; give a file in it"),
        ("pipe.npy", "pipe", "is a device or a pipe"),
        ("link.npy", "/dev/full", "is a device or a pipe"),
        ("dangling.npy", "nowhere", "is a link to a file that does not exist"),
        ("file/x.npy", "below a file", "Not a directory"),
        ("n" * 300 + ".npy", None, "File name too long"),
        ("n" * 300 + "/x.npy", None, "File name too long"),
        ("zero\0.npy", None, "null (byte|character)"),
    ],
)
def test_output_file_refuses_what_is_foreign_or_cannot_be_written(name, content, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    elif content == "directory":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "below a file":
        path.parent.touch()
    elif content:
        path.symlink_to(content)
    with pytest.raises(ConfigError, match=message) as refused:
        check(path)
    assert str(refused.value).startswith("--save_scores=")
    if isinstance(content, bytes):
        assert path.read_bytes() == content


@pytest.mark.parametrize("path", ["/proc/x.npy", "/dev/null/x.npy"])
def test_output_file_refuses_places_where_nothing_can_be_made(path):
    with pytest.raises(ConfigError, match="--save_scores="):
        check(path)


def test_score_file_is_of_the_gallery_s_size_and_needs_the_whole_gallery(tmp_path):
    np.save(tmp_path / "own.npy", np.zeros((2, 10), np.float32))
    assert is_score_file(tmp_path / "own.npy", (2, 10))
    assert not is_score_file(tmp_path / "own.npy", (2, 12))
    with pytest.raises(ConfigError, match="add 1 to --folds"):
        check_score_file(str(tmp_path / "own.npy"), Gallery(folds=(5,)))
    with pytest.raises(ConfigError, match="give a file on this machine"):
        check_score_file("gs://bucket/x.npy", Gallery())
    check_score_file("", Gallery(folds=(5,)))


def test_output_directory_names_foreign_file(tmp_path):
    assert check_output_directory("--out", tmp_path / "new" / "er", RESULT_FILES) == tmp_path / "new" / "er"
    assert not (tmp_path / "new").exists()
    (tmp_path / "notes.txt").write_text("kept")  # the command does not write it
    check_output_directory("--out", tmp_path, RESULT_FILES)
    for name, content in (("metrics.json", '{"accuracy": 0.5}'), ("metrics.json", "[]"), ("ranks.npz", "PK")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=rf"--out=.*: {name}: exists and was not written by this command"):
            check_output_directory("--out", tmp_path, RESULT_FILES)
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=r"notes\.txt is a file; give a directory"):
        check_output_directory("--out", tmp_path / "notes.txt", {})


@pytest.mark.parametrize("suffix", contact_sheet.FORMATS)
def test_picture_replaces_own_picture_and_no_photograph(suffix, tmp_path):
    path = tmp_path / f"photo{suffix}"
    picture = Image.new("RGB", (20, 10))
    picture.save(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="was not written by this command"):
        contact_sheet.check_picture_path(str(path))
    assert path.read_bytes() == before
    path.unlink()
    contact_sheet.save_picture(picture, contact_sheet.check_picture_path(str(path)))
    assert contact_sheet.check_picture_path(str(path)) == path


def test_report_of_compilation_replaces_its_own_alone(tmp_path):
    path = tmp_path / "report"
    for content, is_own in (
        ('{"topology": "v5e:2x4", "fits": true}', True),
        ('{"fits": 1}', False),
        ("\\section{}", False),
    ):
        path.write_text(content)
        if is_own:
            assert check_output_file("--report", path, (), is_compile_report) == path
        else:
            with pytest.raises(ConfigError, match=r"--report=.*was not written by this command"):
                check_output_file("--report", path, (), is_compile_report)
