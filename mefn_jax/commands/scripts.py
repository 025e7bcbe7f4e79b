"""The commands of an installed package, such as `mefn-train`: each does what `python -m MODULE` does."""

import runpy


def run_train() -> None:
    """Runs `mefn-train`."""
    _run_module("mefn_jax.commands.train")


def run_eval() -> None:
    """Runs `mefn-eval`."""
    _run_module("mefn_jax.commands.eval")


def run_prepare() -> None:
    """Runs `mefn-prepare`."""
    _run_module("mefn_jax.data.prepare")


def run_sweep() -> None:
    """Runs `mefn-sweep`."""
    _run_module("mefn_jax.sweep")


def run_export() -> None:
    """Runs `mefn-export`."""
    _run_module("mefn_jax.export")


def _run_module(name: str) -> None:
    """Runs a module as the main one, so that the processes which it starts find it by its name."""
    runpy.run_module(name, run_name="__main__", alter_sys=True)
