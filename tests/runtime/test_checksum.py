"""Checksums of arrays: every bit and every position counts, the sharding does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from mefn_jax.runtime.checksum import compute_checksums, describe_leaves
from mefn_jax.runtime.sharding import make_mesh

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool", "float8_e4m3fn")


def random_bits(dtype, shape=(8, 6)):
    """Returns an array with random bits, NaNs included."""
    dtype, rng = jnp.dtype(dtype), np.random.default_rng(0)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    return np.frombuffer(rng.bytes(dtype.itemsize * int(np.prod(shape))), dtype).reshape(shape)


def checksum(x):
    (value,) = compute_checksums({"x": x}).values()
    return value


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_does_not_depend_on_the_mesh(dtype):
    x, expected = random_bits(dtype), checksum(random_bits(dtype))
    for sizes, spec in (({"data": 8}, ("data",)), ({"data": 2, "fsdp": 2, "tensor": 2}, (("fsdp", "tensor"), "data"))):
        sharding = NamedSharding(make_mesh(sizes), PartitionSpec(*spec))
        assert checksum(jax.device_put(x, sharding)) == expected
    assert checksum(x.T.copy()) != expected
    assert len(expected) == 16


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "bool"])
@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(bit=st.integers(0, 8 * 48 * 4 - 1))
def test_every_flipped_bit_changes_the_checksum(dtype, bit):
    x = random_bits(dtype)
    data = bytearray(x.tobytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    assert checksum(np.frombuffer(bytes(data), x.dtype).reshape(x.shape)) != checksum(x)


def test_moved_values_change_the_checksum():
    x = np.zeros((16, 8), np.float32)
    seen = set()
    for k in range(x.size):
        x.flat[k] = 1.0
        seen.add(checksum(x))
        x.flat[k] = 0.0
    seen |= {checksum(x), checksum(-x)}
    assert len(seen) == x.size + 2


def test_describe_leaves_names_types_and_shapes():
    tree = {"a": {"b": np.zeros((2, 3), np.float32)}, "c": [jnp.int32(1), None]}
    assert describe_leaves(tree) == {"a/b": "float32[2,3]", "c/0": "int32[]"}
    assert compute_checksums(tree).keys() == {"a/b", "c/0"}
