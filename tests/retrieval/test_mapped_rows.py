"""Rows of a mapped file are those of the file, wherever they lie in its pages."""

import numpy as np
import pytest

from mefn_jax.retrieval.mapped_rows import gather_rows


@pytest.mark.parametrize("shape", [(5000, 3), (7, 5000), (4097, 1), (300, 4, 256)])
def test_gather_rows_equals_indexing(shape, tmp_path):
    rng = np.random.default_rng(0)
    array = rng.standard_normal(shape).astype(np.float32)
    np.save(tmp_path / "x.npy", array)
    rows = np.concatenate([[len(array) - 1, 0, 0], rng.integers(0, len(array), 20)])
    for stored in (np.load(tmp_path / "x.npy", mmap_mode="r"), array, array[::2]):
        found = gather_rows(stored, rows % len(stored))
        np.testing.assert_array_equal(found, stored[rows % len(stored)])
        assert not isinstance(found, np.memmap)
