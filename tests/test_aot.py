"""The real train step and scoring step, compiled for TPU slices that are not present."""

import functools
import json
import re

import jax
import numpy as np
import optax
import pytest
from commands import ROOT

import configs.shapes
from mefn_jax import optim
from mefn_jax.model import build_model, split_constants
from mefn_jax.runtime.sharding import batch_sharding, make_mesh, param_shardings, replicated
from mefn_jax.scoring import rerank
from mefn_jax.training import state
from mefn_jax.training.hyperparameters import as_seed
from mefn_jax.training.setup import make_init

pytest.importorskip("libtpu")


TARGET = "v5e:2x4"
GOLDEN = ROOT / "tests" / "fixtures" / "shardings.txt"


@pytest.fixture(scope="module")
def report(command, tmp_path_factory):
    """What the command of docs/tpu.md prints and writes for a train step."""
    path = tmp_path_factory.mktemp("aot") / "report.json"
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    documented = re.search(
        rf"    python (train\.py .*--compile_for={TARGET} .*)", (ROOT / "docs" / "tpu.md").read_text()
    )[1]
    output = command(*documented.split(), f"--compile_report={path}", *mesh).stdout
    return output, json.loads(path.read_text())


def test_compile_for_reports_train_step(report):
    output, report_values = report
    assert set(report_values) >= {
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
    assert (report_values["topology"], report_values["chips"], report_values["hbm_bytes"], report_values["fits"]) == (
        TARGET,
        8,
        16 * 2**30,
        True,
    )
    sizes = report_values["bytes_per_chip"]
    assert sizes["total"] >= sizes["arguments"] + sizes["temporaries"] > 0
    kinds = {c["kind"]: c for c in report_values["collectives"]}
    assert kinds["collective-permute"]["count"] >= 8 * 3  # fragments, masks and pooled vectors go around the ring
    assert report_values["flops_per_step"] > 6 * 1024 * 20 * 150_000  # at least the products of the text tower
    for word in ("fits", "collective-permute", "ms of arithmetic", "largest"):
        assert word in output
    assert len(output.splitlines()) < 25


@pytest.mark.slow
def test_compile_for_explains_step_that_does_not_fit(command, tmp_path):
    path = tmp_path / "report.json"
    done = command(
        "train.py",
        "--compile_for=v5e:2x2",
        f"--compile_report={path}",
        "--config.train.batch_size=65536",
        "--config.train.score_tile_mib=4096",
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"does not fit; try train.remat", done.stdout)
    assert json.loads(path.read_text())["fits"] is False


@pytest.mark.slow
def test_compile_for_reports_scoring_step(command, tmp_path):
    path = tmp_path / "report.json"
    output = command(
        "eval.py", "compile", "--config=configs/shapes.py", f"--target={TARGET}", f"--report={path}"
    ).stdout
    report_values = json.loads(path.read_text())
    c, regions = configs.shapes.get_config(), 9
    tile = report_values["tile"]
    assert f"tiles of {tile['images']} images by {tile['words']} words, {tile['tiles']} a chip" in output
    products = 2 * tile["images"] * regions * tile["words"] * c.embed_dim * tile["tiles"] * 8
    assert products <= report_values["flops_per_step"] <= 5 * products  # sums over words are computed as products, too
    assert report_values["fits"] is True


@pytest.mark.parametrize("target", ["v5e", "v5e:3x5", "v99:2x2", "a100:8"])
def test_compile_for_refuses_unknown_target(target, command):
    done = command("train.py", f"--compile_for={target}", check=False)
    assert done.returncode == 1
    assert f"error: --compile_for={target}: " in done.stderr.splitlines()[-1]
    assert "give v4, v5e, v5p or v6e" in done.stderr


def test_reranker_uses_approximate_top_k_on_tpus_alone():
    from mefn_jax.aot import compile_lowered, topology_devices

    def lowered(mesh):
        whole, rows = replicated(mesh), batch_sharding(mesh)
        vectors = jax.ShapeDtypeStruct((1000, 64), np.float32, sharding=whole)
        captions = jax.ShapeDtypeStruct((32, 16), np.int32, sharding=rows)
        return rerank.compile_reranker(None, False, mesh)[2].lower(vectors, vectors, captions, 100)

    cpu, tpu = lowered(make_mesh()), lowered(make_mesh(None, topology_devices(TARGET)))
    assert ["ApproxTopK" in x.as_text() for x in (cpu, tpu)] == [False, True]
    assert compile_lowered(tpu).memory_analysis().output_size_in_bytes >= 4 * 32 * 100


def test_param_shardings_equal_golden_file():
    """Compares the state's shardings on v5e:2x4 with a text file; `python tests/test_aot.py` writes it again."""
    assert list_shardings() == GOLDEN.read_text()


def list_shardings() -> str:
    from mefn_jax.aot import topology_devices

    config = configs.shapes.get_config()
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, topology_devices(TARGET))
    model = build_model(config, 1000)
    init = make_init(model, config, mesh)
    seed = as_seed(config.train.seed)
    params, _ = split_constants(jax.eval_shape(init, seed))
    factors = optim.lr_multipliers(params, (), 1.0)
    optimizer = optim.adamw(optax.constant_schedule(0.1), 0.1, 1.0, factors)
    shapes = jax.eval_shape(functools.partial(state.create_state, init, seed, optimizer, factors, mesh))
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(param_shardings(mesh, shapes)), strict=True
    )
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape, s.spec) for (path, x), s in leaves]
    return "".join(f"{name:70} {shape!s:18} {spec}\n" for name, shape, spec in named)


def test_make_mesh_joins_slices_along_data():
    from mefn_jax.aot import topology_devices

    devices = topology_devices("v5e:2x2:2")
    mesh = make_mesh({"data": 2, "fsdp": 4}, devices)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]


if __name__ == "__main__":
    GOLDEN.write_text(list_shardings())
