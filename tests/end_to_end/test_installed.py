"""The package as a wheel, installed where no checkout can be imported: its commands, in an empty folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from commands import ROOT, environment, logged

pytestmark = pytest.mark.slow  # builds and installs; what the commands do is tested from the checkout
SOURCES = ("mefn_jax", "configs", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "requirements.txt")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources."""
    copy, out = (tmp_path_factory.mktemp(name) for name in ("sources", "wheel"))
    for name in SOURCES:
        copy_tree = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy_tree(ROOT / name, copy / name)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={out}", str(copy)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory, cache):
    """`installed(*words)` runs a command of an environment that has the wheel, and the packages that it needs, in an
    empty folder, and returns what it prints; `installed.folder` is this folder."""
    root, folder = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("empty")
    venv.create(root, with_pip=False)
    paths = {"base": str(root), "platbase": str(root)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    # The requirements are those of the tests. A checkout that is installed among them stays out of reach, because a
    # folder that a .pth file names brings no .pth files of its own.
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = root / "bin" / "python"
    words = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", f"--python={python}", *words], check=True)
    env = environment(cache)
    env.pop("PYTHONPATH", None)
    env["PATH"] = os.pathsep.join([str(root / "bin"), env["PATH"]])

    def run(*words, status=0):
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout if status == 0 else done.stderr

    run.folder = folder
    place = run("python", "-c", "import mefn_jax; print(mefn_jax.__file__)")
    assert Path(place.strip()).is_relative_to(root), place
    return run


def test_wheel_has_one_top_level_name_and_the_configurations(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"mefn_jax", "mefn_jax-0.1.0.dist-info"}
    files = {name.removeprefix("mefn_jax/configs/") for name in names if name.startswith("mefn_jax/configs/")}
    assert files == {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {"mefn_jax/reports/pages/report.html", "mefn_jax/serving/pages/page.js"} <= set(names)


def test_commands_run_in_an_empty_folder(installed):
    folder = installed.folder
    printed = installed("mefn-train", "--config=shapes:smoke", "--config.data.workers=2")
    assert re.search(r"^commit +release 0\.1\.0$", printed, re.MULTILINE)
    assert "done: 8 steps" in printed
    assert 8 in logged(folder / "runs" / "shapes", "loss")
    assert "mefn (step" in installed("mefn-eval", "--workdir=runs/shapes")
    assert (folder / "runs" / "shapes" / "eval" / "test" / "metrics.json").is_file()
    installed("mefn-export", "--workdir=runs/shapes", "--out=model")
    scores = json.loads((folder / "runs" / "shapes" / "eval" / "test" / "metrics.json").read_text())
    shutil.rmtree(folder / "runs" / "shapes")
    installed("mefn-eval", "--workdir=model")
    again = json.loads((folder / "model" / "eval" / "test" / "metrics.json").read_text())
    assert [again[key] for key in ("i2t", "t2i", "rsum", "twins")] == [
        scores[key] for key in ("i2t", "t2i", "rsum", "twins")
    ]
    code = "import mefn_jax; print(mefn_jax.load('model').encode_texts(['a red circle']).pooled.shape)"
    assert installed("python", "-c", code).strip() == "(1, 32)"
    prepare = ("--source=shapes", "--scenes=16,8,8", "--out=data/scenes")
    installed("mefn-prepare", *prepare)
    options = ("--config=flickr8k:smoke", "--models=vsepp", "--seeds=0", "--out=sweep", "--split=val")
    options += ("--config.train.steps=2", "--config.train.batch_size=8", "--config.data.dir=data/scenes")
    assert "vsepp seed 0: val R@1/5/10" in installed("mefn-sweep", *options)
    assert {path.name for path in folder.iterdir()} == {"runs", "model", "data", "sweep"}


def test_python_interface_and_configurations_are_importable(installed):
    code = "from mefn_jax.configs import default, shapes, towers; print(shapes.get_config('smoke').model)"
    assert installed("python", "-c", code).strip() == "mefn"
    assert "ModuleNotFoundError" in installed("python", "-c", "import configs", status=1)


def test_help_and_errors_name_the_installed_commands(installed):
    assert "mefn-train --config=NAME" in installed("mefn-train", "--help")
    message = installed("mefn-train", "--config=shape:smoke", status=2)
    assert "no such configuration, did you mean 'shapes'?" in message
    assert "default, flickr30k, flickr8k, precomputed, shapes" in message
    assert "error: no runs are named: mefn-eval ensemble" in installed("mefn-eval", "ensemble", "--out=x", status=1)
