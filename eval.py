"""Evaluates a trained model: python eval.py --workdir=runs/shapes [--split=test] [--step=best|latest|N] [--folds=5]"""

from absl import flags

from mefn_jax.config import run


def define_flags() -> None:
    flags.DEFINE_string("workdir", "runs/shapes", "Directory of the training run.")
    flags.DEFINE_string("data_dir", "", "Prepared data set; by default the one trained on.")
    flags.DEFINE_string("split", "test", "train, val (or dev) or test.")
    flags.DEFINE_string("step", "best", "Checkpoint: best (by val rSum), latest, or a step.")
    flags.DEFINE_integer("folds", 1, "Consecutive folds of the images to average over (COCO 1K: 5).", lower_bound=1)


def main() -> None:
    from mefn_jax.evaluate import evaluate  # JAX is not needed for --help

    f = flags.FLAGS
    evaluate(f.workdir, f.data_dir, f.split, f.step, f.folds)


if __name__ == "__main__":
    run(main, define_flags)
