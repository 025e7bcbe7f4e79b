"""The train step: a pure function of state and batch, and the one place where it is compiled."""

import functools
import math

import jax
import jax.numpy as jnp
import optax

from mefn_jax import losses, optim
from mefn_jax.matching.recomputed import recomputed
from mefn_jax.sharding import by_rows, replicated
from mefn_jax.state import TrainState, average


def train_step(
    state: TrainState,
    batch: dict,
    *,
    model,
    optimizer,
    factors,
    loss_at,
    seed: int,
    mesh,
    ema: float = 0.0,
    tile_mib: float = math.inf,
):
    """One step on a batch of `pipeline.training_dataset`; `loss_at` gives the loss at a step (`losses.build`),
    `factors` the learning rates (`optim.rate_factors`): what has 0 stays as it is, and a tower that is frozen whole has
    no dropout. `ema` is the decay of the parameters' average, where the state has one, `tile_mib` the memory of scoring
    on one device (`recomputed`; all at once by default). Returns the new state and float32 scalars {loss, grad_norm}.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    keys = {
        kind: key_of_kind if optim.moves(factors[kind].get("backbone", factors[kind])) else None
        for kind, key_of_kind in zip(("image", "text"), jax.random.split(key), strict=True)
    }
    positives = losses.positives_mask(batch["owner"])
    loss = loss_at(state.step)
    rows = row_keys(seed, batch["epoch"], batch["caption"])
    kept = optim.frozen(state.params, factors)

    def loss_of(trained):
        params = optim.merge(trained, kept)
        images = model.encode_images(params, batch["images"], keys["image"], rows)
        texts = model.encode_texts(params, batch["ids"], batch["mask"], keys["text"])
        # Every device scores its own images against all texts of the global batch.
        texts = jax.lax.with_sharding_constraint(texts, replicated(mesh))
        score = functools.partial(model.score, params)
        scores = recomputed(score, images, texts, tile_mib * mesh.size)
        return loss(scores, positives, params["loss"].get("scale"), params["loss"].get("bias"))

    trained = optim.trainable(state.params, factors)
    value, grads = jax.value_and_grad(loss_of)(trained)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    averaged = None if state.ema is None else average(state.ema, trained, state.step, ema)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
    new = TrainState(state.step + 1, optim.merge(trained, kept), opt_state, averaged)
    return new, jax.tree.map(jnp.float32, metrics)


def row_keys(seed: int, epochs, captions):
    """A random key for each row `(B,)`, which follows from (seed, epoch, caption) alone; for region dropout."""
    key = jax.random.fold_in(jax.random.key(seed), 0x7FFFFFFF)  # a step that no run comes to
    return jax.vmap(lambda e, c: jax.random.fold_in(jax.random.fold_in(key, e), c))(epochs, captions)


def compile_step(mesh, **bound):
    """`train_step` jitted on the mesh: the batch split by rows, everything else on each device, the state donated."""
    everywhere = replicated(mesh)
    return jax.jit(
        functools.partial(train_step, mesh=mesh, **bound),
        in_shardings=(everywhere, by_rows(mesh)),
        out_shardings=(everywhere, everywhere),
        donate_argnums=0,
    )
