"""Trains a model: python train.py --config=configs/NAME.py[:model=...,smoke] --workdir=DIR [--config.x.y=value]"""

from mefn_jax.commands.train import define_flags, main
from mefn_jax.runtime.cli import run_command

if __name__ == "__main__":
    run_command(main, define_flags)
