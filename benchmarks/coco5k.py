"""Evaluates a gallery of the size of COCO 5K, 5,000 images and 25,000 captions: time and memory.

    python benchmarks/coco5k.py [--model=mefn] [--images=5000] [--regions=49] [--width=256]

Random unit vectors; five captions per image, of 8 to 21 words (14.7 on average). Timed from Features in memory to the
metrics of the whole gallery and of its five folds, from the same scores, and the ten best results of every query.
Memory is the peak of the process, which includes the features (about 0.8 GB). The last line is JSON.
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
from scoring import make_matcher, projections_of, random_features  # benchmarks/scoring.py

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from mefn_jax import metrics
from mefn_jax.evaluation.evaluator import default_score_tile_mib
from mefn_jax.matching.systems import MODELS
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring.ranking import rank
from mefn_jax.scoring.tiles import TILE_CAPTIONS, TILE_IMAGES, TiledScores, compile_tile_scorer, even_slices

CAPTIONS_PER_IMAGE, FOLDS, NUM_RESULTS = 5, 5, 10


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mefn", choices=sorted(MODELS))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--regions", type=int, default=49)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    mesh, captions = make_mesh(), options.images * CAPTIONS_PER_IMAGE
    images, texts = random_features(options.images, captions, options.regions, options.width)
    matcher = make_matcher(options.model)
    example = jax.tree.map(lambda x: x[:2], (images, texts))
    params = matcher.init(jax.random.key(0), *example)
    score_tile = functools.partial(matcher.apply, method="score_tile")
    with_pooled, mib = matcher.uses_pooled_products, default_score_tile_mib(mesh)
    scorer = compile_tile_scorer(score_tile, with_pooled, mesh, mib, projections_of(matcher))
    scores = TiledScores(functools.partial(scorer, params), images, texts, mesh)
    start = time.perf_counter()
    scores(even_slices(options.images, TILE_IMAGES)[0], even_slices(captions, TILE_CAPTIONS)[0])
    compilation = time.perf_counter() - start
    image_index = np.arange(captions) // CAPTIONS_PER_IMAGE
    start = time.perf_counter()
    ranking = rank(scores, image_index, (1, FOLDS), NUM_RESULTS, show_progress=True)
    metrics_of_all = metrics.retrieval_metrics(*ranking.counts[1], image_index)
    fold_size = captions // FOLDS
    folds = [
        metrics.retrieval_metrics(
            *(counts[start_caption : start_caption + fold_size] for counts in ranking.counts[FOLDS]),
            image_index[start_caption : start_caption + fold_size] - start_caption // CAPTIONS_PER_IMAGE,
        )
        for start_caption in range(0, captions, fold_size)
    ]
    seconds = time.perf_counter() - start
    metrics_of_folds = metrics.average_metrics(folds)
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    pairs = options.images * captions
    print(
        f"{options.model}: {options.images:,} x {captions:,} pairs, {options.regions} regions, D = {options.width}: "
        f"{seconds:.0f} s ({pairs / seconds:,.0f} pairs/s), after {compilation:.0f} s for the first tile with its "
        f"compilation; {gib:.2f} GiB peak memory; rSum {metrics_of_all['rsum']:.2f}, mean of {FOLDS} folds "
        f"{metrics_of_folds['rsum']:.2f} (chance)"
    )
    print(
        json.dumps(
            {
                "model": options.model,
                "images": options.images,
                "captions": captions,
                "regions": options.regions,
                "width": options.width,
            }
            | {"seconds": seconds, "compilation_s": compilation, "peak_gib": gib}
            | {"rsum": metrics_of_all["rsum"], "rsum_folds": metrics_of_folds["rsum"]}
        )
    )


if __name__ == "__main__":
    main()
