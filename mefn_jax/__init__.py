"""Image-text retrieval in JAX: MEFN (Liu & Fan 2025) and the systems it is compared with."""

__version__ = "0.1.0"


def load(workdir, step="best", ema: bool = False):
    """A trained model from a run's directory: a `library.Trained`; see `library.load`."""
    from mefn_jax.retrieval.api import load  # JAX and the rest, which the package alone does not need

    return load(workdir, step, ema)
