"""Benchmarks that README names run, as small as they go; what they time is not looked at."""

import importlib.util
import json


def last_line(result):
    return json.loads(result.stdout.splitlines()[-1])


def test_the_step_on_an_accelerator(command):
    rows = last_line(command("benchmarks/gpu_step.py", "--tiny", "--batch=8", "--steps=1"))
    assert [row["step"] for row in rows][:2] == ["ours, clip", "ours, mefn"]
    assert all(row["pairs_per_s"] > 0 and row["batch"] == 8 for row in rows)
    assert 0 < rows[1]["scores"] < 1


def test_scoring(command):
    sizes = "--sizes=6x20,300x40"
    seconds = last_line(command("benchmarks/scoring.py", sizes, "--regions=4", "--width=16", "--skip_torch"))
    assert set(seconds) == {"6x20", "300x40"}
    assert all(seconds["300x40"][name] > 0 for name in ("gemm", "scan", "mefn"))


def test_what_doubling_costs(command):
    found = last_line(command("benchmarks/scoring.py", "--growth", "--sizes=6x20", "--regions=4", "--width=16"))
    assert found["mefn images"]["arithmetic"] == 2
    assert all(1 < factors["arithmetic"] < 5 for factors in found.values())
    assert all(factors["time"] > 0 for factors in found.values())


def test_a_gallery_of_cocos_form(command):
    small = ("--images=40", "--regions=4", "--width=16", "--model=scan_t2i_lse")
    found = last_line(command("benchmarks/coco5k.py", *small))
    assert (found["images"], found["captions"]) == (40, 200)
    assert 0 < found["rsum"] < found["rsum_folds"]  # chance, among 40 images and among 8


def test_reading(command):
    found = last_line(command("benchmarks/data.py", "--number=32", "--repeats=1", "--rows=128"))
    assert found["vs_decoder"] > 0
    assert found["precomputed"] > 0


def test_an_epoch_of_cocos_size(command, tmp_path):
    few = ("--images=60", "--steps=2", "--region_steps=2", f"--dir={tmp_path}")
    found = last_line(command("benchmarks/coco_epoch.py", *few))
    assert set(found) == {"prepared", "regions"}
    for kind in found.values():
        assert (kind["images"], kind["steps"], kind["no_caption_twice"]) == (60, 2, True)
        assert kind["resident_mb"] > 0
    assert not list(tmp_path.iterdir())


def test_encoders(command):
    """Where torch is not installed the command says so."""
    result = command("benchmarks/encoders.py", "--models=vit_s16", "--batch=1", "--repeats=1", check=False)
    if importlib.util.find_spec("torch"):
        assert result.returncode == 0, result.stderr
        assert last_line(result)["vit_s16"]["forward"] > 0
    else:
        assert result.returncode == 1
        assert "pip install torch" in result.stderr


def test_a_large_index(command, tmp_path):
    found = last_line(command("benchmarks/retrieval.py", "--images=3000", "--width=16", f"--dir={tmp_path}"))
    assert found["query"] > 0
    assert not list(tmp_path.iterdir())


def test_what_a_tile_moves(command):
    """Compiled for a TPU: no array of regions by words leaves the chip's memory."""
    (found,) = last_line(command("benchmarks/tile_traffic.py", "--model=scan_t2i_lse"))
    assert found["blocks"] > 0
    assert found["blocks_in_hbm"] == 0
    assert found["largest_in_hbm"]
    assert found["least_us"]["hbm"] > 0
