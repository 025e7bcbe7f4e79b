"""Image-text retrieval in JAX: MEFN (Liu & Fan 2025) and the systems that it is compared with."""

__version__ = "0.1.0"


def load(workdir, step="best", ema: bool = False):
    """Loads a trained model from the directory of a run, or an exported one from its folder or the Hugging Face hub.
    Returns a `Retriever`; see `load` in `retrieval/api.py`."""
    from mefn_jax.retrieval.api import load  # imports JAX, which the package itself does not need

    return load(workdir, step, ema)
