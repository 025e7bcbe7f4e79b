"""Encoding a batch in chunks."""

import jax
import jax.numpy as jnp
import numpy as np

from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.training.grad_cache import encode_in_chunks

B = 16


def test_encode_in_chunks_repeats_dropout_in_backward_pass():
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    x, w, key = jnp.arange(48.0).reshape(B, 3) / 48, jnp.array([1.0, -2, 3]), jax.random.key(0)

    def encode(w):
        return lambda key, x: jnp.tanh(x * w) * jax.random.bernoulli(key, 0.5, x.shape)

    def encode_in_loop(w):
        rows_of_chunk = np.arange(B).reshape(2, 4, -1).swapaxes(0, 1).reshape(4, -1)  # by device, chunk, row
        chunks = [encode(w)(k, x[rows]) for k, rows in zip(jax.random.split(key, 4), rows_of_chunk, strict=True)]
        return jnp.zeros_like(x).at[rows_of_chunk.reshape(-1)].set(jnp.concatenate(chunks))

    def loss(make):
        return lambda w: jnp.sum(jnp.square(make(w)))

    computed = jax.jit(jax.value_and_grad(loss(lambda w: encode_in_chunks(encode(w), key, (x,), mesh=mesh, chunks=4))))(
        w
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), computed, jax.value_and_grad(loss(encode_in_loop))(w)
    )
