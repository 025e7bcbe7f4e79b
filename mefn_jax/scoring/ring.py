"""Scores of all pairs of a batch that is spread over devices, so that negatives come from every device.

Each device keeps its images, and the texts travel around a ring (docs/method.md, Eq. 48; as in Ring Attention, Liu et
al. 2023): at each hop a device scores its images against the texts that it holds and passes the texts on; after as many
hops as devices, the texts are back where they started. No device ever holds the fragments of the whole batch. In the
backward pass the texts travel around once more, with their gradients. Letters: n devices, I images and T texts on each.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mefn_jax.features import Features
from mefn_jax.scoring.chunks import merge_floats, split_floats


def ring_scores(score, params, images: Features, texts: Features, mesh) -> jax.Array:
    """Computes `score(params, images, texts)` of the global batch, float32 `(B, B)`, with rows split over all axes of
    `mesh` (docs/method.md, Eq. 48).

    Differentiable with respect to the parameters and the features. B is a multiple of the number of devices.
    """
    if mesh.size == 1:
        return score(params, images, texts)
    rows = PartitionSpec(mesh.axis_names)
    ring = functools.partial(_run_ring, score, mesh.axis_names, mesh.size)
    return jax.shard_map(ring, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=rows)(params, images, texts)


def local_loss(score, loss, params, images: Features, texts: Features, *, items: tuple, mesh) -> jax.Array:
    """Computes the mean over devices of `loss(params, scores, *items)`, where each device scores its own pairs alone
    (docs/method.md, Eq. 49). `items` are trees of arrays with a row for each pair, as the image index `(B,)`."""

    def compute_on_device(params, images, texts, items):
        scores = score(_vary(params, mesh.axis_names), images, texts)
        return jax.lax.pmean(loss(params, scores, *items), mesh.axis_names)

    rows, replicas = PartitionSpec(mesh.axis_names), PartitionSpec()
    specs = (replicas, rows, rows, rows)
    return jax.shard_map(compute_on_device, mesh=mesh, in_specs=specs, out_specs=replicas)(params, images, texts, items)


def _vary(tree, axes):
    """Marks what is equal on all devices as varying: each device then has its own gradient, and JAX adds them."""
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree)


def _run_ring(score, axes, n: int, params, images, texts):
    """Computes this device's rows of the scores, `(I, n T)`."""

    def send(tree):
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, [(k, (k - 1) % n) for k in range(n)]), tree)

    def locate_column(hop, texts):
        """Returns the first column of the texts that this device holds at `hop`."""
        return (jax.lax.axis_index(axes) + hop) % n * texts.mask.shape[0]

    def score_rows(params, images, texts):
        def score_hop(carry, hop):
            texts, rows = carry
            scores = score(params, images, texts)
            rows = jax.lax.dynamic_update_slice(rows, scores, (0, locate_column(hop, texts)))
            return (send(texts), rows), None

        empty = _vary(jnp.zeros((images.mask.shape[0], n * texts.mask.shape[0]), texts.pooled.dtype), axes)
        return jax.lax.scan(score_hop, (texts, empty), jnp.arange(n))[0][1]

    def forward(params, images, texts):
        return score_rows(params, images, texts), (params, images, texts)

    def backward(residuals, gradient):
        params, images, texts = residuals

        def add_gradients(carry, hop):
            texts, params_grad, images_grad, texts_grad = carry
            text_floats, text_rest = split_floats(texts)
            image_floats, image_rest = split_floats(images)
            _, vjp = jax.vjp(
                lambda p, v, t: score(p, merge_floats(v, image_rest), merge_floats(t, text_rest)),
                params,
                image_floats,
                text_floats,
            )
            size = (images.mask.shape[0], texts.mask.shape[0])
            p, v, t = vjp(jax.lax.dynamic_slice(gradient, (0, locate_column(hop, texts)), size))
            params_grad, images_grad, texts_grad = jax.tree.map(
                jnp.add, (params_grad, images_grad, texts_grad), (p, v, t)
            )
            return (send(texts), params_grad, images_grad, send(texts_grad)), None

        zeros = jax.tree.map(jnp.zeros_like, (params, split_floats(images)[0], split_floats(texts)[0]))
        (_, params_grad, images_grad, texts_grad), _ = jax.lax.scan(add_gradients, (texts, *zeros), jnp.arange(n))
        return params_grad, images_grad, texts_grad

    ring = jax.custom_vjp(score_rows)
    ring.defvjp(forward, backward)
    return ring(_vary(params, axes), images, texts)
