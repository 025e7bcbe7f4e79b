"""Random Features of encoded images and texts, and strategies of their masks."""

import jax
import numpy as np
from hypothesis import strategies as st

from mefn_jax.features import Features, make_features


def random_features(rng, B, L, D, mask=None, extra=None, repeat="") -> Features:
    """Returns Features of `B` items with `L` fragments of width `D`, as NumPy arrays.

    `rng` is a generator or its seed; `mask` (B, L) says which fragments exist, by default all. With
    `repeat="fragments"` all fragments of an item are equal, with `repeat="items"` all items have the same fragments.
    """
    rng = np.random.default_rng(rng)
    mask = np.ones((B, L), bool) if mask is None else np.asarray(mask)
    fragments = rng.normal(size=(B, L, D)).astype(np.float32)
    if repeat == "fragments":
        fragments[:] = fragments[:, :1]
    elif repeat == "items":
        fragments[:] = fragments[:1]
    pooled = rng.normal(size=(B, D)).astype(np.float32)
    return jax.tree.map(np.asarray, make_features(fragments, mask, pooled, extra))


def masks(B, L):
    """Returns a strategy of masks `(B, L)` in which every item has a fragment."""
    row = st.lists(st.booleans(), min_size=L, max_size=L).filter(any)
    return st.lists(row, min_size=B, max_size=B).map(np.array)


def length_mask(rng, B, L) -> np.ndarray:
    """Returns a mask `(B, L)` of texts with 1 to `L` words, drawn from `rng`, a generator or its seed."""
    return np.arange(L) < np.random.default_rng(rng).integers(1, L + 1, (B, 1))
