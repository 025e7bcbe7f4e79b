"""Runs, evaluations and indexes of every earlier format, which this version must read to the same results.

`fixtures/format_K.tar.gz` has `run/` (checkpoints and the evaluation of val) and `index/` (of four images) as the last
commit of format K wrote them. For a new format, first add the archive of the format before, from a run of

    python train.py --config=configs/shapes.py:smoke --workdir=run --config.train.ema_decay=0.5 --config.embed_dim=8 ...

with one layer of width 8 in both encoders, images of 24 pixels in patches of 8, and `text.vocab_size=100`. Formats 1
to 3 have one run, in three layouts.
"""

import tarfile

import jax
import numpy as np
import pytest
from commands import ROOT

from mefn_jax.data import images
from mefn_jax.evaluation.evaluate import evaluate
from mefn_jax.evaluation.results import read_results
from mefn_jax.evaluation.run import Gallery, TrainedRun
from mefn_jax.reports.compare import read_evaluation
from mefn_jax.retrieval.search import search_images
from mefn_jax.runtime import checkpoint

# What a search for "a red circle" found in the index of each format: images and scores.
FIRST_RUN = ["2.png", "0.png", "1.png", "3.png"], [0.0994, 0.0798, -0.0124, -0.1768]
FOUND = {
    "format_1": FIRST_RUN,
    "format_2": FIRST_RUN,
    "format_3": FIRST_RUN,
    "format_4": (["0.png", "2.png", "1.png", "3.png"], [-0.1532, -0.1609, -0.1763, -0.1822]),
    "format_5": (["2.png", "3.png", "1.png", "0.png"], [-0.0744, -0.0829, -0.0937, -0.1041]),
    "format_6": (["2.png", "3.png", "1.png", "0.png"], [-0.0736, -0.0812, -0.0940, -0.1014]),
}
ARCHIVES = sorted((ROOT / "tests" / "fixtures").glob("format_*.tar.gz"))
# Format 1 passes through the steps of all later ones, whose own archives are read nightly, but for the newest two.
NIGHTLY = ARCHIVES[1:-2]


def test_every_format_has_an_archive():
    names = [path.name for path in ARCHIVES]
    assert names == [f"format_{k}.tar.gz" for k in range(1, checkpoint.CHECKPOINT_FORMAT.number + 1)]


@pytest.mark.parametrize(
    "archive",
    [pytest.param(path, marks=pytest.mark.slow) if path in NIGHTLY else path for path in ARCHIVES],
    ids=lambda path: path.name.removesuffix(".tar.gz"),
)
def test_run_of_earlier_format_is_read_to_the_same_results(archive, tmp_path, monkeypatch):
    if archive.name in ("format_1.tar.gz", "format_2.tar.gz", "format_3.tar.gz"):
        # The first run was evaluated on images resized at a reduced scale, which only training may use now.
        monkeypatch.setattr(images, "_resize_whole", images._resize_reduced)
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    run = TrainedRun(tmp_path / "run", "latest")
    report, ranks = read_results(tmp_path / "run" / "eval" / "val")
    assert read_evaluation(tmp_path / "run", "val").metrics["rsum"] == report["rsum"]
    result = evaluate(run, Gallery(split="val"), out=str(tmp_path / "again"))
    # Two captions may change places by rounding: 0.83 is one of 120 captions.
    assert result.report["rsum"] == pytest.approx(report["rsum"], abs=1.7)
    for key in ("positive_scores", "t2i_top_scores", "i2t_top_scores"):
        np.testing.assert_allclose(result.ranks[key], ranks[key], atol=1e-4, err_msg=key)
    np.testing.assert_array_equal(result.ranks["caption_image"], ranks["caption_image"])
    _, averaged, _ = TrainedRun(tmp_path / "run", "latest", ema=True).load()
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (averaged, result.params)), strict=True))
    found = search_images(run, str(tmp_path / "index"), "a red circle")
    names, scores = FOUND[archive.name.removesuffix(".tar.gz")]
    assert [name for _, name in found] == names
    np.testing.assert_allclose([score for score, _ in found], scores, atol=2e-4)
