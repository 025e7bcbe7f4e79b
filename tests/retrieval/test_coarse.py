"""The nearest vectors, for many queries at once, against a sort of all products; on devices and from a file."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.errors import TrainingError
from mefn_jax.retrieval import coarse
from mefn_jax.retrieval.coarse import CoarseSearch
from mefn_jax.runtime.sharding import make_mesh

SIZES = {"seed": st.integers(0, 2**31), "number": st.integers(1, 40), "k": st.integers(1, 12)}
SIZES |= {"chunk": st.sampled_from([3, 8, 64]), "devices": st.sampled_from([1, 8]), "queries": st.integers(1, 5)}


@settings(deadline=None, max_examples=60)
@given(**SIZES, kept=st.booleans())
def test_find_equals_sorted_products(seed, number, k, chunk, devices, queries, kept):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (number, 4)).astype(np.float32)  # with many ties
    batch, readable = rng.integers(-2, 3, (queries, 4)).astype(np.float32), rng.random(number) < 0.8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coarse, "CHUNK", chunk)
        patch.setattr(coarse, "MAX_QUERIES", 4)
        patch.setattr(coarse, "fits_devices", lambda size, mesh: kept)
        search = CoarseSearch(vectors, make_mesh(devices=jax.devices()[:devices]), readable)
        positions, products = search.find(batch, k)
        everything = search.products(batch)
    assert search.is_kept == kept
    for query, found, best in zip(batch, positions, products, strict=True):
        expected = [j for j in np.argsort(-(vectors @ query), kind="stable") if readable[j]][:k]
        assert found.tolist() == expected
        np.testing.assert_array_equal(best, (vectors @ query)[expected])
    np.testing.assert_array_equal(everything, np.where(readable, batch @ vectors.T, -np.inf))


def test_search_refuses_products_that_are_not_finite():
    vectors = np.ones((5, 3), np.float32)
    vectors[3, 1] = np.nan
    for method in ("find", "products"):
        with pytest.raises(TrainingError, match="is not finite"):
            getattr(CoarseSearch(vectors, make_mesh()), method)(np.ones((1, 3)), *[2][: method == "find"])
    readable = np.arange(5) != 3  # the vector of an image that could not be decoded is ignored
    assert CoarseSearch(vectors, make_mesh(), readable).find(np.ones((1, 3)), 2)[0].tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("platform", "stats", "fits"),
    [
        ("cpu", {"bytes_limit": 10**12}, False),
        ("gpu", None, False),
        ("gpu", {"bytes_limit": 3000, "bytes_in_use": 1000}, True),
        ("gpu", {"bytes_limit": 3000, "bytes_in_use": 1002}, False),
    ],
)
def test_vectors_stay_on_accelerators_with_room(platform, stats, fits):
    """Four devices get a quarter of 4,000 bytes each, and half of their free memory may be taken."""
    device = SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    mesh = SimpleNamespace(local_devices=[device], shape={"data": 4, "fsdp": 1, "tensor": 1})
    assert coarse.fits_devices(4000, mesh) == fits
