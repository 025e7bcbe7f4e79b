"""Image-text retrieval in JAX: MEFN (Liu & Fan 2025) and the systems it is compared with."""

__version__ = "0.1.0"
