"""A small trained run for the tests of exports, and its exported folder."""

import shutil
import tarfile

import pytest
from commands import ROOT

from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.export.__main__ import export_run


@pytest.fixture(scope="session")
def small_run(once):
    """The workdir of a trained MEFN of 8 dimensions with averaged parameters and an evaluation of val."""

    def unpack(folder):
        with tarfile.open(ROOT / "tests" / "fixtures" / "format_5.tar.gz") as file:
            file.extractall(folder, filter="data")

    return once("small_run", unpack) / "run"


@pytest.fixture(scope="session")
def small_export(once, small_run):
    """The exported folder of `small_run`."""
    return once("small_export", lambda folder: export_run(TrainedRun(small_run), folder / "model")) / "model"


@pytest.fixture
def exported(small_export, tmp_path):
    """A copy of `small_export`, to be changed."""
    return shutil.copytree(small_export, tmp_path / "model")
