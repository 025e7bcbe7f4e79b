"""Benchmarks that README names run, as small as they go; what they time is not looked at."""

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


def test_a_gallery_of_cocos_form(command):
    small = ("--images=40", "--regions=4", "--width=16", "--model=scan_t2i_lse")
    found = last_line(command("benchmarks/coco5k.py", *small))
    assert (found["images"], found["captions"]) == (40, 200)
    assert 0 < found["rsum"] < found["rsum_folds"]  # chance, among 40 images and among 8
