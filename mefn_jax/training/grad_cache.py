"""Gradient caching: encodes a batch in chunks and again in the backward pass, so that only one chunk's activations are
in memory (Gao et al. 2021; docs/method.md, Eq. 51)."""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mefn_jax.runtime.sharding import BATCH_AXES, batch_shards


def encode_in_chunks(encode, key, inputs, *, mesh, chunks: int):
    """Returns `encode(key, *inputs)` for a batch `inputs`, a tuple of arrays `(B, ...)`, computed in `chunks` chunks.

    The scores still see the features of the whole batch. With `chunks` > 1, the backward pass encodes each chunk again,
    with the same dropout, and adds up the gradients (docs/method.md, Eq. 51). `key` is None without dropout. Each
    device splits its own rows, so that no data moves between devices.
    """
    if chunks == 1:
        return encode(key, *inputs)
    chunk_inputs = jax.tree.map(lambda x: _split_chunks(x, mesh, chunks), inputs)
    chunk_keys = None if key is None else jax.random.split(key, chunks)
    encode_chunk = jax.checkpoint(lambda chunk: encode(chunk[0], *chunk[1]))
    return jax.tree.map(lambda x: _merge_chunks(x, mesh, chunks), jax.lax.map(encode_chunk, (chunk_keys, chunk_inputs)))


def _split_chunks(x, mesh, chunks):
    """Reshapes `(B, ...)` to `(chunks, B / chunks, ...)`. Chunk k holds the k-th block of rows of every device."""
    shards = batch_shards(mesh)
    x = x.reshape(shards, chunks, -1, *x.shape[1:]).swapaxes(0, 1)
    x = x.reshape(chunks, -1, *x.shape[3:])
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))


def _merge_chunks(x, mesh, chunks):
    """Reshapes `(chunks, B / chunks, ...)` back to `(B, ...)`: the inverse of `_split_chunks`."""
    shards = batch_shards(mesh)
    x = x.reshape(chunks, shards, -1, *x.shape[2:]).swapaxes(0, 1)
    x = x.reshape(-1, *x.shape[3:])
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
