"""Trains a model: python train.py --config=configs/NAME.py[:model=...,smoke] --workdir=DIR [--config.x.y=value]

The same command goes on from the latest checkpoint in the workdir. At each step, in this order: the next batch, the
step, then where they are due the log line, the evaluation on val, and the checkpoint.
"""

from absl import flags

from mefn_jax.config import config_flag, config_path, run


def define_flags() -> None:
    config_flag("configs/shapes.py")
    flags.DEFINE_string(
        "workdir", "", "Directory of checkpoints and logs, may be gs://BUCKET/PATH; default: runs/NAME."
    )


def main() -> None:
    from mefn_jax.training import train  # JAX is not needed for --help

    train(flags.FLAGS.config, flags.FLAGS.workdir or f"runs/{config_path().stem}")


if __name__ == "__main__":
    run(main, define_flags)
