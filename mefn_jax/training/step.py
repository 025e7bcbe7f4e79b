"""The train step: a pure function of state and batch, and the one place where it is compiled."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mefn_jax import losses, optim
from mefn_jax.model import Model
from mefn_jax.runtime.sharding import batch_sharding, param_shardings, replicated
from mefn_jax.scoring.ring import local_loss, ring_scores
from mefn_jax.training.grad_cache import encode_in_chunks
from mefn_jax.training.state import TrainState, ema_update


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step needs beside the state and the batch; nothing here changes in a run.

    Attributes:
        model, optimizer: the model, and what makes updates of gradients.
        factors: the learning rates (`optim.rate_factors`): what has 0 stays as it is, and a tower that is frozen whole
            has no dropout.
        loss_at: gives the loss at a step (`losses.build`).
        seed: of the dropout.
        ema_decay: the decay of the parameters' average, where the state has one.
        score_tile_mib: the memory of scoring on a device (`recomputed`); all at once by default.
        negatives: "global", all texts of the batch, or "local", those of the same device.
        grad_cache_chunks: into how many parts the batch is cut for the encoders (`in_parts`).
    """

    model: Model
    optimizer: optax.GradientTransformation
    factors: dict
    loss_schedule: Callable
    seed: int
    ema_decay: float = 0.0
    score_tile_mib: float = math.inf
    negatives: str = "global"
    grad_cache_chunks: int = 1


def make_step_config(config, model: Model, optimizer, factors) -> StepConfig:
    """The recipe of a configuration."""
    c = config.train
    negatives, parts = config.loss.negatives, c.grad_cache_chunks
    loss_at = losses.make_loss(config.loss)
    return StepConfig(model, optimizer, factors, loss_at, c.seed, c.ema_decay, c.score_tile_mib, negatives, parts)


def train_step(state: TrainState, batch: dict, *, recipe: StepConfig, mesh):
    """One step on a batch of `pipeline.training_dataset`. Returns the new state, and float32 {loss, grad_norm}."""
    model, factors = recipe.model, recipe.factors
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    keys = {
        kind: key_of_kind if optim.is_trained(factors[kind].get("backbone", factors[kind])) else None
        for kind, key_of_kind in zip(("image", "text"), jax.random.split(key), strict=True)
    }
    loss = recipe.loss_schedule(state.step)
    rows = row_keys(recipe.seed, batch["epoch"], batch["caption_index"])
    kept = optim.frozen(state.params, factors)

    def loss_of(trained):
        params = optim.merge(trained, kept)
        encode = functools.partial(encode_in_chunks, mesh=mesh, chunks=recipe.grad_cache_chunks)
        encode_images = functools.partial(model.encode_images, params)
        encode_texts = functools.partial(model.encode_texts, params)
        images = encode(lambda key, x, row: encode_images(x, key, row), keys["image"], (batch["images"], rows))
        texts = encode(
            lambda key, ids, mask: encode_texts(ids, mask, key), keys["text"], (batch["text"], batch["text_mask"])
        )
        scored = {"matcher": params["matcher"], "loss": params["loss"]}  # the towers' do not go round
        scoring = {"images": images, "texts": texts, "mesh": mesh, "score_tile_mib": recipe.score_tile_mib}

        def loss_of_scores(params, scores, owner):
            positives = losses.positives_mask(owner)
            return loss(scores, positives, params["loss"].get("scale"), params["loss"].get("bias"))

        if recipe.negatives == "local":
            return local_loss(model.score, loss_of_scores, scored, owner=batch["image_index"], **scoring)
        return loss_of_scores(scored, ring_scores(model.score, scored, **scoring), batch["image_index"])

    trained = optim.trainable(state.params, factors)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for `of_own_rows`
        value, grads = jax.value_and_grad(loss_of)(trained)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    averaged = None if state.ema is None else ema_update(state.ema, trained, state.step, recipe.ema_decay)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
    new = TrainState(state.step + 1, optim.merge(trained, kept), opt_state, averaged)
    return new, jax.tree.map(jnp.float32, metrics)


def row_keys(seed: int, epochs, captions):
    """A random key for each row `(B,)`, which follows from (seed, epoch, caption) alone; for region dropout."""
    key = jax.random.fold_in(jax.random.key(seed), 0x7FFFFFFF)  # a step that no run comes to
    return jax.vmap(lambda e, c: jax.random.fold_in(jax.random.fold_in(key, e), c))(epochs, captions)


def compile_step(mesh, state, recipe: StepConfig):
    """`train_step` jitted on the mesh: the batch split by rows, the state (or its shapes) laid out by the rules of
    `sharding.py` and donated."""
    where = param_shardings(mesh, state)
    return jax.jit(
        functools.partial(train_step, recipe=recipe, mesh=mesh),
        in_shardings=(where, batch_sharding(mesh)),
        out_shardings=(where, replicated(mesh)),
        donate_argnums=0,
    )
