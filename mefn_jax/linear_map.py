"""Scores a linear map of frozen features, the row that a trained system has to beat: regularised CCA of mean regions
and mean words.

    python -m mefn_jax.linear_map --config=configs/precomputed.py --config.data.dir=DIR --config.data.words=WORDS \\
        --split=val --out=DIR [--hold_out=500]

Ridges and power are chosen by rSum on the last `hold_out` images of train; then the map is made again of all of train
(unless held_out itself is to be scored) and scored once. Writes `metrics.json` and `ranks.npz`, as `eval.py` does.
"""

import dataclasses
import itertools

import jax
import numpy as np
from absl import flags

from mefn_jax import evaluate, losses, metrics, start, towers
from mefn_jax.config import check, check_local, config_flag, run
from mefn_jax.data.dataset import ALIASES, HELD_OUT
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.errors import ConfigError
from mefn_jax.evaluator import Evaluator, fitted, open_dataset
from mefn_jax.logs import say
from mefn_jax.model import CHOICES, build, empty_images, empty_texts
from mefn_jax.ranking import rank
from mefn_jax.remote import directory
from mefn_jax.sharding import make_mesh
from mefn_jax.start import LinearMap, Means, fit, means

RIDGES_X, RIDGES_Y = (1.0, 3.0, 10.0, 30.0), (0.03, 0.1, 0.3, 1.0)
POWERS = (0.5, 1.0, 1.5)


@dataclasses.dataclass(frozen=True)
class Cosines:
    """`tiled.Scores`: cosines of projected mean features `(I, K)` and `(C, K)`."""

    images: np.ndarray
    texts: np.ndarray

    def __call__(self, rows: slice, columns: slice) -> np.ndarray:
        return self.images[rows] @ self.texts[columns].T


def cosines(linear: LinearMap, power: float, found: Means) -> Cosines:
    """The map's scores of a split."""
    A, B = linear.weighted(power, len(linear.correlations))
    sides = (found.images - linear.mean_x) @ A, (found.texts - linear.mean_y) @ B
    return Cosines(*(x / np.linalg.norm(x, axis=1, keepdims=True) for x in sides))


def chosen(train: Means, held_out: Means) -> tuple[float, float, float]:
    """The ridges of images and texts and the power that give the highest rSum on held-out images."""
    best = (-1.0,)
    for ridges in itertools.product(RIDGES_X, RIDGES_Y):
        linear = fit(train, *ridges)
        for power in POWERS:
            found = rank(cosines(linear, power, held_out), held_out.owner)
            rsum = metrics.summarise(*found.counts[1], held_out.owner)["rsum"]
            best = max(best, (rsum, *ridges, power))
    say(
        f"chosen on {len(held_out.images)} held-out images: ridges {best[1]:g}, {best[2]:g}, power {best[3]:g}, "
        f"rSum {best[0]:.1f}"
    )
    return best[1:]


def joined(first: Means, second: Means) -> Means:
    """The means of two splits as one."""
    return Means(
        np.concatenate([first.images, second.images]),
        np.concatenate([first.texts, second.texts]),
        np.concatenate([first.owner, second.owner + len(first.images)]),
    )


def linear_map(config, split: str, hold_out: int, out: str) -> dict:
    """Chooses, fits and scores; see above. Returns what `metrics.json` holds. Raises ConfigError or DataError."""
    check(config, CHOICES | losses.CHOICES)
    check_local("data.dir", config.data.dir)
    start.check(config)
    out = directory("--out", out)
    config = config.copy_and_resolve_references().unlock()
    config.data.hold_out = hold_out
    dataset, name = open_dataset(config), ALIASES.get(split, split)
    splits = {part: dataset.split(part) for part in ("train", HELD_OUT, name)}
    config, found, json = towers.load(fitted(config, splits[name]))
    t = config.text
    tokenizer = Tokenizer(json or dataset.tokenizer_json, t.max_words, t.lower_case, t.punctuation)
    model = build(config, tokenizer.vocab_size)
    params = model.init(jax.random.key(0), empty_images(config), *empty_texts(config))
    params = towers.with_pretrained(params, found)
    evaluator = Evaluator(model, tokenizer, config, make_mesh())
    features = {part: means(evaluator, params, opened) for part, opened in splits.items()}
    train, held = features["train"], features[HELD_OUT]
    ridge_x, ridge_y, power = chosen(train, held)
    whole = train if name == HELD_OUT else joined(train, held)
    scores = cosines(fit(whole, ridge_x, ridge_y), power, features[name])
    evaluator.config.unlock().model = "linear_map"
    report, ranks = evaluate.ranked(evaluator, scores, "CCA", dataset, splits[name])
    image = {"transform": config.image.regions.transform}
    report["config"] = {"model": "linear_map", "image": image, "ridges": [ridge_x, ridge_y], "power": power}
    evaluate.write(out, report, ranks)
    return report


def define_flags() -> None:
    config_flag("configs/precomputed.py")
    flags.DEFINE_string("split", "test", "What is scored: val, test or held_out.")
    flags.DEFINE_integer("hold_out", 500, "Images at the end of train that ridges and power are chosen on.", 1)
    flags.DEFINE_string("out", "", "Where metrics.json and ranks.npz go.")


def main() -> None:
    f = flags.FLAGS
    if not f.out:
        raise ConfigError("--out=DIR is missing: where metrics.json and ranks.npz go")
    linear_map(f.config, f.split, f.hold_out, f.out)


if __name__ == "__main__":
    run(main, define_flags)
