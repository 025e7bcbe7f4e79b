"""Each benchmark that README names runs at its smallest size; its timings are not checked."""

import importlib.util
import json

import pytest

pytestmark = pytest.mark.slow


def last_line(result):
    return json.loads(result.stdout.splitlines()[-1])


def test_gpu_step_benchmark_runs(command):
    rows = last_line(command("benchmarks/gpu_step.py", "--tiny", "--batch=8", "--steps=1", "--models=clip,mefn"))
    assert [row["step"] for row in rows][:2] == ["ours, clip", "ours, mefn"]
    assert all(row["pairs_per_s"] > 0 and row["batch"] == 8 for row in rows)
    assert 0 < rows[1]["scores"] < 1


def test_scoring_benchmark_runs(command):
    sizes = "--sizes=6x20,300x40"
    models = "--models=scan,mefn,visita,sfe,mate"
    seconds = last_line(command("benchmarks/scoring.py", sizes, models, "--regions=4", "--width=16", "--skip_torch"))
    assert set(seconds) == {"6x20", "300x40"}
    assert all(seconds["300x40"][name] > 0 for name in ("gemm", "scan", "mefn", "visita", "sfe", "mate"))


def test_training_benchmark_runs(command):
    small = ("--widths=16", "--batch=8", "--regions=4", "--words=5", "--skip_torch")
    result_of = last_line(command("benchmarks/training.py", *small))["D16"]
    assert result_of["gemm"] > 0
    assert all(
        result_of[name]["train"] > 0
        for name in ("mefn", "mefn_no_entropy", "scan_t2i_lse", "visita", "sfe", "mate", "vsepp")
    )


def test_scoring_benchmark_reports_growth(command):
    result_of = last_line(command("benchmarks/scoring.py", "--growth", "--sizes=6x20", "--regions=4", "--width=16"))
    assert result_of["mefn images"]["arithmetic"] == 2
    assert all(1 < factors["arithmetic"] < 5 for factors in result_of.values())
    assert all(factors["time"] > 0 for factors in result_of.values())


def test_scoring_benchmark_certifies_first_results(command):
    table = last_line(command("benchmarks/scoring.py", "--certified", "--sizes=200x1000", "--width=64"))
    assert [row["directions"] for row in table] == [8, 16, 32, 64]
    assert 0 < table[0]["captions"] + table[0]["images"] < 0.5
    assert table[0]["spread"] > table[-1]["spread"] > 0


def test_coco5k_benchmark_runs(command):
    small = ("--images=40", "--regions=4", "--width=16", "--model=scan_t2i_lse")
    result_of = last_line(command("benchmarks/coco5k.py", *small))
    assert (result_of["images"], result_of["captions"]) == (40, 200)
    assert 0 < result_of["rsum"] < result_of["rsum_folds"]  # chance among 40 images, and among 8


def test_data_benchmark_runs(command):
    result_of = last_line(command("benchmarks/data.py", "--number=32", "--repeats=1", "--rows=128"))
    assert result_of["vs_decoder"] > 0
    assert result_of["precomputed"] > 0


def test_coco_epoch_benchmark_visits_every_caption_once(command, tmp_path):
    few = ("--images=60", "--steps=2", "--region_steps=2", f"--dir={tmp_path}")
    result_of = last_line(command("benchmarks/coco_epoch.py", *few))
    assert set(result_of) == {"prepared", "regions"}
    for kind in result_of.values():
        assert (kind["images"], kind["steps"], kind["no_caption_twice"]) == (60, 2, True)
        assert kind["resident_mb"] > 0
    assert not list(tmp_path.iterdir())


def test_encoders_benchmark_runs_or_asks_for_torch(command):
    """Without torch, the command asks for it."""
    result = command("benchmarks/encoders.py", "--models=vit_s16", "--batch=1", "--repeats=1", check=False)
    if importlib.util.find_spec("torch"):
        assert result.returncode == 0, result.stderr
        assert last_line(result)["vit_s16"]["forward"] > 0
    else:
        assert result.returncode == 1
        assert "pip install torch" in result.stderr


def test_retrieval_benchmark_runs(command, tmp_path):
    small = ("--images=3000", "--width=16", "--regions=4", f"--dir={tmp_path}")
    result_of = last_line(command("benchmarks/retrieval.py", *small))
    for name in ("embedding", "matcher"):
        assert result_of[name]["first query"] > result_of[name]["later query"] > 0
    assert not list(tmp_path.iterdir())


def test_tile_traffic_benchmark_keeps_blocks_on_chip(command):
    """Compiled for a TPU: no array of regions by words leaves the chip's memory."""
    (result_of,) = last_line(command("benchmarks/tile_traffic.py", "--model=scan_t2i_lse"))
    assert result_of["blocks"] > 0
    assert result_of["blocks_in_hbm"] == 0
    assert result_of["largest_in_hbm"]
    assert result_of["least_us"]["hbm"] > 0


def test_study_of_hard_negatives_runs(command, tmp_path):
    for row in ("with", "without", "with"):
        command("benchmarks/hard_negatives.py", row, "--seed=3", f"--out={tmp_path}", "--smoke")
    table = command("benchmarks/hard_negatives.py", "table", f"--out={tmp_path}").stdout.splitlines()
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == ["row", "", "seed 3", "mean ± deviation"]
    assert [line.split(" | ")[:2] for line in table[2:]] == [
        ["| without", "rSum"],
        ["| without", "twins"],
        ["| with", "rSum"],
        ["| with", "twins"],
    ]
    logs = {row: (tmp_path / "3" / row / "metrics.jsonl").read_text().splitlines() for row in ("with", "without")}
    steps = {row: [json.loads(line) for line in lines if '"loss"' in line] for row, lines in logs.items()}
    losses = {row: {line["step"]: line["loss"] for line in lines} for row, lines in steps.items()}
    assert losses["with"][4] == losses["without"][4]  # the first half is the same
    assert losses["with"][8] != losses["without"][8]
