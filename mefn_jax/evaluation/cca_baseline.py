"""Scores CCA of frozen features, without training: the baseline that a trained system has to beat.

    python -m mefn_jax.evaluation.cca_baseline --config=configs/precomputed.py --config.data.dir=DIR \\
        --config.data.cached_text=WORDS --split=val --out=DIR [--held_out_images=500]

The score of a pair is the cosine of the projected mean region and the projected mean word (docs/method.md, Eq. 11).
Ridges and power are chosen by rSum on the last `held_out_images` images of train. Then CCA is fitted again to all of
train (unless held_out itself is scored), and the split is scored once. Writes `metrics.json` and `ranks.npz`, as
`eval.py` does.
"""

import dataclasses
import itertools

import jax
import numpy as np
from absl import flags

from mefn_jax import metrics
from mefn_jax.data.dataset import HELD_OUT
from mefn_jax.data.from_config import make_tokenizer, open_dataset
from mefn_jax.encoders.inputs import dummy_inputs
from mefn_jax.encoders.pretrained import towers
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation import evaluate, results
from mefn_jax.evaluation.cca import CCA, MeanFeatures, check_supports_cca, fit_cca, mean_features
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.evaluation.run import define_split_flag, split_from_flags
from mefn_jax.model import build_model
from mefn_jax.resolve import resolve, validate
from mefn_jax.runtime.cli import define_config_flag, define_count_flag, define_path_flag, run_command
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.outputs import check_output_directory
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring.ranking import rank

# The grid of hyperparameters: ridges of images and of texts, and the power of the correlations.
RIDGES_X, RIDGES_Y = (1.0, 3.0, 10.0, 30.0), (0.03, 0.1, 0.3, 1.0)
POWERS = (0.5, 1.0, 1.5)


@dataclasses.dataclass(frozen=True)
class CosineScores:
    """Cosines of projected mean features, unit vectors `(I, K)` and `(C, K)`: a `tiles.Scores`."""

    images: np.ndarray
    texts: np.ndarray

    def __call__(self, rows: slice, columns: slice) -> np.ndarray:
        return self.images[rows] @ self.texts[columns].T


def cosine_scores(cca: CCA, power: float, features: MeanFeatures) -> CosineScores:
    """Returns the scores of a split by CCA, its correlations taken to the `power`."""
    W_x, W_y = cca.projections(power, len(cca.correlations))
    projected = (features.images - cca.mean_x) @ W_x, (features.texts - cca.mean_y) @ W_y
    return CosineScores(*(x / np.linalg.norm(x, axis=1, keepdims=True) for x in projected))


def choose_hyperparameters(train: MeanFeatures, held_out: MeanFeatures) -> tuple[float, float, float]:
    """Returns the ridges of images and of texts and the power that have the highest rSum on held-out images."""
    best = (-1.0,)
    for ridges in itertools.product(RIDGES_X, RIDGES_Y):
        cca = fit_cca(train, *ridges)
        for power in POWERS:
            ranking = rank(cosine_scores(cca, power, held_out), held_out.image_index)
            rsum = metrics.retrieval_metrics(*ranking.counts[1], held_out.image_index)["rsum"]
            best = max(best, (rsum, *ridges, power))
    print0(
        f"chosen on {len(held_out.images)} held-out images: ridges {best[1]:g}, {best[2]:g}, power {best[3]:g}, "
        f"rSum {best[0]:.1f}"
    )
    return best[1:]


def concatenate_means(first: MeanFeatures, second: MeanFeatures) -> MeanFeatures:
    """Returns the mean features of two splits as those of one."""
    return MeanFeatures(
        np.concatenate([first.images, second.images]),
        np.concatenate([first.texts, second.texts]),
        np.concatenate([first.image_index, second.image_index + len(first.images)]),
    )


def evaluate_cca(config, split: str, held_out_images: int, out: str) -> dict:
    """Chooses hyperparameters, fits CCA and scores a split (see the module's docstring).

    Returns the report that is written to `metrics.json`. Raises ConfigError or DataError.
    """
    validate(config)
    check_supports_cca(config)
    out = check_output_directory("--out", out, results.RESULT_FILES)
    config = config.copy_and_resolve_references().unlock()
    config.data.held_out_images = held_out_images
    dataset = open_dataset(config)
    splits = {name: dataset.split(name) for name in ("train", HELD_OUT, split)}
    resolved = resolve(config, (splits[split],))
    config = resolved.config
    tokenizer = make_tokenizer(config, resolved.tokenizer_json or dataset.tokenizer_json)
    model = build_model(config, tokenizer.vocab_size)
    params = model.init(jax.random.key(0), *dummy_inputs(config))
    params = towers.insert_pretrained(params, resolved.towers)
    evaluator = Evaluator(model, tokenizer, config, make_mesh())
    features = {name: mean_features(evaluator, params, opened) for name, opened in splits.items()}
    train, held_out = features["train"], features[HELD_OUT]
    ridge_x, ridge_y, power = choose_hyperparameters(train, held_out)
    fit_features = train if split == HELD_OUT else concatenate_means(train, held_out)
    scores = cosine_scores(fit_cca(fit_features, ridge_x, ridge_y), power, features[split])
    report, ranks = evaluate.rank_and_report(evaluator, scores, "CCA baseline", dataset, splits[split])
    image = {"power_norm": config.image.regions.power_norm}
    options = {"image": image, "ridges": [ridge_x, ridge_y], "power": power}
    report |= {"evaluated": "CCA baseline", "config": options}
    results.write_results(out, report, ranks)
    return report


def define_flags() -> None:
    """Defines the flags of the command."""
    define_config_flag("precomputed")
    define_split_flag()
    define_count_flag(
        "held_out_images", 500, "Number of images at the end of train on which ridges and power are chosen."
    )
    define_path_flag("out", "", "Directory for metrics.json and ranks.npz.")


def main() -> None:
    """Runs the command."""
    f = flags.FLAGS
    if not f.out:
        raise ConfigError("--out=DIR is missing: give a directory for metrics.json and ranks.npz")
    evaluate_cca(f.config, split_from_flags(), f.held_out_images, f.out)


if __name__ == "__main__":
    run_command(main, define_flags)
