"""The real train step and scoring step, compiled for TPU slices that are not there."""

import json
import re

import pytest
from conftest import ROOT

import configs.shapes
from mefn_jax.sharding import make_mesh

pytest.importorskip("libtpu")

TARGET = "v5e:2x4"


@pytest.fixture(scope="module")
def report(command, tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "report.json"
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    readmes = re.search(rf"    python (train\.py .*--compile_for={TARGET} .*)", (ROOT / "README.md").read_text())[1]
    said = command(*readmes.split(), f"--compile_report={path}", *mesh).stdout
    return said, json.loads(path.read_text())


def test_the_train_step_is_compiled_and_described(report):
    said, facts = report
    assert set(facts) >= {
        "topology",
        "chips",
        "hbm_bytes",
        "bytes_per_chip",
        "fits",
        "collectives",
        "flops_per_step",
        "lower_bound_s",
        "parameters",
        "largest",
    }
    assert (facts["topology"], facts["chips"], facts["hbm_bytes"], facts["fits"]) == (TARGET, 8, 16 * 2**30, True)
    sizes = facts["bytes_per_chip"]
    assert sizes["total"] >= sizes["arguments"] + sizes["temporaries"] > 0
    kinds = {c["kind"]: c for c in facts["collectives"]}
    assert kinds["collective-permute"]["count"] >= 8 * 3  # fragments, masks and pooled vectors go round
    assert facts["flops_per_step"] > 6 * 1024 * 20 * 150_000  # at least the text tower's own matrices
    for word in ("fits", "collective-permute", "ms of arithmetic", "largest"):
        assert word in said
    assert len(said.splitlines()) < 25


def test_what_does_not_fit_says_what_to_change(command, tmp_path):
    path = tmp_path / "report.json"
    done = command(
        "train.py",
        "--compile_for=v5e:2x2",
        f"--compile_report={path}",
        "--config.train.batch_size=65536",
        "--config.train.tile_mib=4096",
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"does not fit; try train.remat", done.stdout)
    assert json.loads(path.read_text())["fits"] is False


def test_the_scoring_step_is_compiled(command, tmp_path):
    path = tmp_path / "report.json"
    said = command(
        "eval.py", "--config=configs/shapes.py", f"--compile_for={TARGET}", f"--compile_report={path}"
    ).stdout
    facts = json.loads(path.read_text())
    assert "a tile of 32 images by 256 captions" in said
    c, regions, words = configs.shapes.get_config(), 9, 20
    assert facts["flops_per_step"] >= 2 * 32 * 256 * regions * words * c.embed_dim
    assert facts["fits"] is True


@pytest.mark.parametrize("target", ["v5e", "v5e:3x5", "v99:2x2", "a100:8"])
def test_unknown_slices_are_refused(target, command):
    done = command("train.py", f"--compile_for={target}", check=False)
    assert done.returncode == 1
    assert f"error: --compile_for={target}: " in done.stderr.splitlines()[-1]
    assert "give v4, v5e, v5p or v6e" in done.stderr


def test_slices_are_joined_along_data():
    from mefn_jax.aot import devices_of

    devices = devices_of("v5e:2x2:2")
    mesh = make_mesh({"data": 2, "fsdp": 4}, devices)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
