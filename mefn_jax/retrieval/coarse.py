"""Finds the vectors of an index that are nearest to queries, exactly: the first stage of a search.

Vectors are kept on accelerators if they fit there (`fits_devices`), and otherwise read from where they are, a chunk at
a time: vectors of a file that is mapped into memory need no more memory than a chunk. I vectors, Q queries.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mefn_jax.data.pipeline import pad_rows
from mefn_jax.errors import TrainingError
from mefn_jax.runtime.sharding import batch_sharding, batch_shards, from_full_copy, replicated, round_up

CHUNK = 1 << 15  # vectors searched at once
MAX_QUERIES = 64  # queries searched at once
DEVICE_SHARE = 0.5  # of an accelerator's free memory that vectors may take; the rest is for scoring


class CoarseSearch:
    """The vectors of an index, to be searched by inner products.

    `vectors (I, D)` may be mapped from disk; `readable` bool `(I,)` leaves vectors out. With several devices, each has
    a part of every chunk.

    Attributes:
        is_kept: whether the vectors are on the devices.
    """

    def __init__(self, vectors: np.ndarray, mesh, readable: np.ndarray | None = None):
        self._vectors, self._mesh = vectors, mesh
        self._readable = np.ones(len(vectors), bool) if readable is None else readable
        self._size = round_up(min(CHUNK, len(vectors)), mesh.size)
        self.is_kept = fits_devices(4 * vectors.size, mesh)
        self._kept = list(self._read_chunks()) if self.is_kept else None

    def find(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds the k vectors whose inner products with each of `queries (Q, D)` are largest, or all that are readable
        if these are fewer.

        Returns positions int64 `(Q, k)` and products float32 `(Q, k)`, best first, equal products by position. Raises
        TrainingError for a product that is not finite.
        """
        k = min(k, int(self._readable.sum()))
        batches = [self._find_batch(queries[n : n + MAX_QUERIES], k) for n in range(0, len(queries), MAX_QUERIES)]
        return tuple(np.concatenate(x) for x in zip(*batches, strict=True))

    def products(self, queries: np.ndarray) -> np.ndarray:
        """Returns the inner products with all vectors, float32 `(Q, I)`, -inf for those that are left out. Raises as
        `find` does."""
        queries, number = self._place(queries)
        parts = [np.asarray(_require_finite(*_multiply(queries, *chunk))) for chunk in self._chunks()]
        return np.concatenate(parts, 1)[:number, : len(self._vectors)]

    def _find_batch(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        queries, number = self._place(queries)
        positions, products = np.empty((number, 0), np.int64), np.empty((number, 0), np.float32)
        for n, chunk in enumerate(self._chunks()):
            new_products, new_positions, is_finite = _find_top_k(queries, *chunk, k=min(k, self._size))
            new_products = np.asarray(_require_finite(new_products, is_finite))[:number]
            # Earlier positions stand first, so that a stable sort leaves equal products in order of position.
            positions = np.concatenate([positions, np.asarray(new_positions, np.int64)[:number] + n * self._size], 1)
            products = np.concatenate([products, new_products], 1)
            order = np.argsort(-products, axis=1, kind="stable")[:, :k]
            positions, products = (np.take_along_axis(x, order, 1) for x in (positions, products))
        return positions, products

    def _place(self, queries: np.ndarray):
        """Returns the queries on the devices, filled up to a power of two so that few programs are compiled, and their
        number."""
        padded = pad_rows(np.asarray(queries, np.float32), 1 << (len(queries) - 1).bit_length())
        return from_full_copy(replicated(self._mesh), padded), len(queries)

    def _chunks(self):
        return self._kept if self.is_kept else self._read_chunks()

    def _read_chunks(self):
        """Yields the vectors in chunks of one size, `(vectors, mask)` on the devices; `mask` is False for padding and
        for what is left out."""
        for first in range(0, len(self._vectors), self._size):
            chunk = np.asarray(self._vectors[first : first + self._size], np.float32)
            mask = pad_rows(self._readable[first : first + self._size], self._size)
            yield from_full_copy(batch_sharding(self._mesh), (pad_rows(chunk, self._size), mask))


def fits_devices(size: int, mesh) -> bool:
    """Returns whether arrays of `size` bytes, split over the devices, may stay there: on accelerators, if they take at
    most DEVICE_SHARE of the memory that is free. On a CPU nothing is gained."""
    for device in mesh.local_devices:
        stats = device.memory_stats() if device.platform != "cpu" else None
        free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0) if stats else 0
        if size / batch_shards(mesh) > DEVICE_SHARE * free:
            return False
    return True


def _require_finite(products, is_finite):
    """Returns products. Raises TrainingError unless they are finite."""
    if not is_finite:
        raise TrainingError(
            "the embedding of the query, or one of the index, is not finite; the parameters are not either"
        )
    return products


@jax.jit
def _multiply(queries, vectors, mask):
    """Returns the products of queries with a chunk, `(Q, CHUNK)`, and whether all are finite."""
    products = jnp.einsum("qd,id->qi", queries, vectors, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(mask, products, -jnp.inf), jnp.all(jnp.isfinite(products) | ~mask)


@functools.partial(jax.jit, static_argnames="k")
def _find_top_k(queries, vectors, mask, *, k: int):
    products, is_finite = _multiply(queries, vectors, mask)
    return *jax.lax.top_k(products, k), is_finite
