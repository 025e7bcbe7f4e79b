"""Trains a model: python train.py --config=NAME[:model=...,smoke] --workdir=DIR [--config.x.y=value]

NAME is a configuration of this project, such as shapes, or the path of a file of your own.

The same command resumes from the latest checkpoint in the workdir. Each step loads the next batch and updates the
parameters; then, if they are due, come the log line, the checkpoint, and the evaluation on val, in this order.
"""

import sys

from absl import flags

from mefn_jax.runtime.cli import (
    config_path,
    define_compile_flags,
    define_config_flag,
    define_path_flag,
    define_process_flags,
    run_command,
)


def define_flags() -> None:
    """Defines the flags of the command."""
    define_config_flag("shapes")
    define_path_flag("workdir", "", "Directory of checkpoints and logs, may be gs://BUCKET/PATH; default: runs/NAME.")
    flags.DEFINE_bool("print_config", False, "Print every option with its value, its origin and its comment, and exit.")
    flags.DEFINE_string("profile", "", "START:N: record a trace of N steps after step START in WORKDIR/profile.")
    define_process_flags()
    define_compile_flags()


def main() -> None:
    """Trains, or prints the configuration, or compiles the train step for a TPU slice."""
    f = flags.FLAGS
    if f.print_config:
        from mefn_jax.print_config import format_config

        print(format_config(f.config, str(config_path()), sys.argv))
        return
    if f.compile_for:
        from mefn_jax.aot import compile_train

        sys.exit(0 if compile_train(f.config, f.compile_for, f.compile_report) else 1)
    from mefn_jax.runtime.multihost import initialize  # imported late: --help does not need JAX
    from mefn_jax.training.loop import train

    initialize()
    train(f.config, f.workdir or f"runs/{config_path().stem}", f.profile)


if __name__ == "__main__":
    run_command(main, define_flags)
