"""Encoding a batch in chunks, each computed again in the backward pass, so that memory is that of one part."""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mefn_jax.runtime.sharding import BATCH_AXES, batch_shards


def encode_in_chunks(encode, key, inputs, *, mesh, chunks: int):
    """`encode(key, *inputs)` of a batch, a tuple of arrays `(B, ...)`; with `chunks` > 1 in so many of them.

    The scores are then made of the whole batch's features all the same (gradient caching, Gao et al. 2021): the
    backward pass encodes each part again, with the same dropout, and adds up its gradients. `key` is None without
    dropout. Each device cuts its own rows, so that nothing moves between devices.
    """
    if chunks == 1:
        return encode(key, *inputs)
    cut = jax.tree.map(lambda x: _split_chunks(x, mesh, chunks), inputs)
    keys = None if key is None else jax.random.split(key, chunks)
    part = jax.checkpoint(lambda one: encode(one[0], *one[1]))
    return jax.tree.map(lambda x: _merge_chunks(x, mesh, chunks), jax.lax.map(part, (keys, cut)))


def _split_chunks(x, mesh, chunks):
    """`(B, ...)` to `(chunks, B / chunks, ...)`: the k-th part has the k-th rows of every device."""
    n = batch_shards(mesh)
    x = x.reshape(n, chunks, -1, *x.shape[1:]).swapaxes(0, 1)
    x = x.reshape(chunks, -1, *x.shape[3:])
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))


def _merge_chunks(x, mesh, chunks):
    """The way back."""
    n = batch_shards(mesh)
    x = x.reshape(chunks, n, -1, *x.shape[2:]).swapaxes(0, 1)
    x = x.reshape(-1, *x.shape[3:])
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
