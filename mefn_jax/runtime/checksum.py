"""Checksums of the arrays of a train state, computed where the arrays are: on the devices, each its own shards."""

import functools
import math

import jax
import jax.numpy as jnp

# Odd constants of the usual 32-bit mixers (murmur3, xxhash), one row for each half of a checksum.
MIXERS = ((0x85EBCA6B, 0xC2B2AE35, 0x9E3779B1), (0x27D4EB2F, 0x165667B1, 0x85EBCA77))


def describe_leaves(tree) -> dict[str, str]:
    """Returns the type and shape of each leaf of a tree of arrays, or of their shapes, by path: "float32[8,16]"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in leaves
    }


def compute_checksums(tree) -> dict[str, str]:
    """Returns a checksum of 64 bits, in hexadecimal, of each leaf of a tree of arrays, by path.

    A checksum depends on all bits and their positions, and not on the sharding: each value is mixed with its position
    by a bijection, and the results are added modulo 2^32, twice with other constants. A change of one value therefore
    always changes it. Several processes call this together.
    """
    sums = jax.device_get(jax.tree.leaves(jax.tree.map(_sum_leaf, tree)))  # dispatched before the first is read
    names = describe_leaves(tree)
    return {name: f"{first:08x}{second:08x}" for name, (first, second) in zip(names, sums, strict=True)}


@jax.jit
def _sum_leaf(x):
    """Computes both halves of a checksum, uint32 `(2,)`."""
    words = _to_words(x)
    strides = [math.prod(words.shape[k + 1 :]) for k in range(words.ndim)]
    iotas = [jax.lax.broadcasted_iota(jnp.uint32, words.shape, k) for k in range(words.ndim)]
    position = functools.reduce(jnp.add, [i * jnp.uint32(s % 2**32) for i, s in zip(iotas, strides, strict=True)])
    return jnp.stack([jnp.sum(_mix(words, position, *constants), dtype=jnp.uint32) for constants in MIXERS])


def _to_words(x):
    """Returns the bits of an array as uint32, at least one axis; values of 64 bits become two."""
    x = jnp.atleast_1d(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    size = x.dtype.itemsize
    if size >= 4:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}[size]).astype(jnp.uint32)


def _mix(words, position, first: int, second: int, third: int):
    """Mixes words with their positions; a bijection of the words at each position."""
    h = (words ^ (position * jnp.uint32(third))) * jnp.uint32(first)
    h = (h ^ (h >> 15)) * jnp.uint32(second)
    h = (h ^ (position + jnp.uint32(first))) * jnp.uint32(third)
    return h ^ (h >> 13)
