"""Evaluates a gallery of COCO 5K's size in full, 5,000 images and 25,000 captions: time and memory.

    python benchmarks/coco5k.py [--model=mefn] [--images=5000] [--regions=49] [--width=256]

Random unit vectors, captions of 8 to 21 words (14.7 on average), five an image. From Features in memory to the metrics
of the whole gallery and of five folds of it, from the same scores, and the ten best of every query. Memory is the
process's peak, the features (about 0.8 GB) among it. Last line: JSON.
"""

import argparse
import functools
import json
import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np
from scoring import drawn  # beside this file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout need not be installed

from mefn_jax import metrics
from mefn_jax.evaluation.evaluator import default_score_tile_mib
from mefn_jax.model import MODELS
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring.ranking import rank
from mefn_jax.scoring.tiles import TILE_CAPTIONS, TILE_IMAGES, TiledScores, compile_tile_scorer, even_slices

PER_IMAGE, FOLDS, BEST = 5, 5, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mefn", choices=sorted(MODELS))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--regions", type=int, default=49)
    parser.add_argument("--width", type=int, default=256)
    o = parser.parse_args()
    mesh, captions = make_mesh(), o.images * PER_IMAGE
    images, texts = drawn(o.images, captions, o.regions, o.width)
    kind, options = MODELS[o.model]
    module = kind(**options)
    few = jax.tree.map(lambda x: x[:2], (images, texts))
    params = module.init(jax.random.key(0), *few)
    step = compile_tile_scorer(functools.partial(module.apply, method="score_tile"), mesh, default_score_tile_mib(mesh))
    scores = TiledScores(functools.partial(step, params), images, texts, mesh)
    start = time.perf_counter()
    scores(even_slices(o.images, TILE_IMAGES)[0], even_slices(captions, TILE_CAPTIONS)[0])
    compilation = time.perf_counter() - start
    owner = np.arange(captions) // PER_IMAGE
    start = time.perf_counter()
    found = rank(scores, owner, (1, FOLDS), BEST, bar=True)
    whole = metrics.retrieval_metrics(*found.counts[1], owner)
    size = captions // FOLDS
    folds = [
        metrics.retrieval_metrics(*(n[k : k + size] for n in found.counts[FOLDS]), owner[k : k + size] - k // PER_IMAGE)
        for k in range(0, captions, size)
    ]
    seconds = time.perf_counter() - start
    fifth = metrics.average_metrics(folds)
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    pairs = o.images * captions
    print(
        f"{o.model}: {o.images:,} x {captions:,} pairs, {o.regions} regions, D = {o.width}: {seconds:.0f} s "
        f"({pairs / seconds:,.0f} pairs/s; the first tile, compilation included, {compilation:.0f} s before it), "
        f"{gib:.2f} GiB at most; rSum {whole['rsum']:.2f}, of {FOLDS} folds {fifth['rsum']:.2f} (chance)"
    )
    print(
        json.dumps(
            {"model": o.model, "images": o.images, "captions": captions, "regions": o.regions, "width": o.width}
            | {"seconds": seconds, "compilation_s": compilation, "peak_gib": gib}
            | {"rsum": whole["rsum"], "rsum_folds": fifth["rsum"]}
        )
    )


if __name__ == "__main__":
    main()
