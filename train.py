"""Trains a model: python train.py --config=configs/NAME.py[:model=...,smoke] --workdir=DIR [--config.x.y=value]

The same command goes on from the latest checkpoint in the workdir. At each step, in this order: the next batch, the
step, then where they are due the log line, the evaluation on val, and the checkpoint.
"""

import sys

from absl import flags

from mefn_jax.runtime.cli import (
    config_path,
    define_compile_flags,
    define_config_flag,
    define_process_flags,
    run_command,
)


def define_flags() -> None:
    define_config_flag("configs/shapes.py")
    flags.DEFINE_string(
        "workdir", "", "Directory of checkpoints and logs, may be gs://BUCKET/PATH; default: runs/NAME."
    )
    flags.DEFINE_string("profile", "", "START:N, records a trace of these steps into WORKDIR/profile.")
    define_process_flags()
    define_compile_flags()


def main() -> None:
    f = flags.FLAGS
    if f.compile_for:
        from mefn_jax.aot import compile_train

        sys.exit(0 if compile_train(f.config, f.compile_for, f.compile_report) else 1)
    from mefn_jax.runtime.multihost import initialize  # JAX is not needed for --help
    from mefn_jax.training.loop import train

    initialize()
    train(f.config, f.workdir or f"runs/{config_path().stem}", f.profile)


if __name__ == "__main__":
    run_command(main, define_flags)
