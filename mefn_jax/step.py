"""The train step: a pure function of state and batch, and the one place where it is compiled."""

import functools

import jax
import jax.numpy as jnp
import optax

from mefn_jax import losses
from mefn_jax.sharding import by_rows, replicated
from mefn_jax.state import TrainState


def train_step(state: TrainState, batch: dict, *, model, optimizer, loss_at, seed: int, mesh):
    """One step on a batch `{pixels (B, H, W, 3), ids (B, L), mask (B, L), image (B,)}`; `loss_at` gives the loss at a
    step (`losses.build`). Returns the new state and float32 scalars {loss, grad_norm}."""
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    image_key, text_key = jax.random.split(key)
    positives = losses.positives_mask(batch["image"])
    loss = loss_at(state.step)

    def loss_of(params):
        images = model.encode_images(params, batch["pixels"], image_key)
        texts = model.encode_texts(params, batch["ids"], batch["mask"], text_key)
        # Every device scores its own images against all texts of the global batch.
        texts = jax.lax.with_sharding_constraint(texts, replicated(mesh))
        scores = model.score(params, images, texts)
        return loss(scores, positives, params["loss"].get("scale"), params["loss"].get("bias"))

    value, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": value, "grad_norm": optax.global_norm(grads)}
    return TrainState(state.step + 1, params, opt_state), jax.tree.map(jnp.float32, metrics)


def compile_step(mesh, **bound):
    """`train_step` jitted on the mesh: the batch split by rows, everything else on each device, the state donated."""
    everywhere = replicated(mesh)
    return jax.jit(
        functools.partial(train_step, mesh=mesh, **bound),
        in_shardings=(everywhere, by_rows(mesh)),
        out_shardings=(everywhere, everywhere),
        donate_argnums=0,
    )
