"""Performs the train step: a pure function of state and batch, compiled in one place (`compile_step`)."""

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
from mefn_jax.scoring.chunks import make_block_scorer
from mefn_jax.scoring.ring import local_loss, ring_scores
from mefn_jax.training.grad_cache import encode_in_chunks
from mefn_jax.training.hyperparameters import Hyperparameters
from mefn_jax.training.loss_inputs import EncodedBatch, compute_loss_inputs
from mefn_jax.training.state import TrainState, ema_params, ema_update


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Everything that the compiled step depends on: a change of it is another program. The numbers that do not change
    the program are `Hyperparameters`.

    Attributes:
        model: the model.
        make_optimizer: function from hyperparameters to the transformation of gradients to updates.
        lr_multipliers: multiplier of each parameter's learning rate (`optim.lr_multipliers`). 0 freezes the parameter;
            a tower whose parameters are all frozen gets no dropout.
        loss: the loss, `(params, scores, positives, hyperparameters, step, **inputs) -> scalar` (`losses.make_loss`).
        loss_needs: names of the loss's further inputs (`loss_inputs.LOSS_INPUTS`).
        score_chunk_mib, score_tile_mib: memory limits of scoring on a device (`scoring/chunks.py`); none by default.
        negatives: "global": all texts of the batch; "local": the texts on the same device.
        skip_equal_captions: whether captions that are equal as text are no negatives of each other.
        grad_cache_chunks: number of chunks in which the encoders process the batch (`encode_in_chunks`).
    """

    model: Model
    make_optimizer: Callable
    lr_multipliers: dict
    loss: Callable
    score_chunk_mib: float = math.inf
    score_tile_mib: float = math.inf
    negatives: str = "global"
    skip_equal_captions: bool = False
    grad_cache_chunks: int = 1
    loss_needs: tuple[str, ...] = ()


def make_step_config(config, model: Model, lr_multipliers) -> StepConfig:
    """Returns the StepConfig of a configuration."""

    def make_optimizer(hyper: Hyperparameters) -> optax.GradientTransformation:
        return optim.adamw(hyper.learning_rate_at, hyper.weight_decay, hyper.clip_norm, lr_multipliers)

    return StepConfig(
        model=model,
        make_optimizer=make_optimizer,
        lr_multipliers=lr_multipliers,
        loss=losses.make_loss(config.loss),
        score_chunk_mib=config.train.score_chunk_mib,
        score_tile_mib=config.train.score_tile_mib,
        negatives=config.loss.negatives,
        skip_equal_captions=config.loss.skip_equal_captions,
        grad_cache_chunks=config.train.grad_cache_chunks,
        loss_needs=losses.LOSSES[config.loss.name].needs,
    )


def train_step(state: TrainState, batch: dict, hyper: Hyperparameters, *, step_config: StepConfig, mesh):
    """Performs one step on a batch of `pipeline.training_dataset`. Returns the new state and the metrics `{loss,
    grad_norm}`, float32."""
    model, lr_multipliers = step_config.model, step_config.lr_multipliers
    key = jax.random.fold_in(jax.random.key(hyper.seed), state.step)
    keys = {
        kind: tower_key if optim.is_trained(lr_multipliers[kind].get("backbone", lr_multipliers[kind])) else None
        for kind, tower_key in zip(("image", "text"), jax.random.split(key), strict=True)
    }
    region_dropout_keys = row_keys(hyper.seed, batch["epoch"], batch["caption_index"], batch["view"])
    frozen_params = optim.select_frozen(state.params, lr_multipliers)

    encode = functools.partial(encode_batch, batch, step_config=step_config, mesh=mesh)

    def compute_loss(trained_params, teacher_scores):
        params = optim.merge(trained_params, frozen_params) | {"constants": state.constants}
        encoded = EncodedBatch(model, params, *encode(params, keys, region_dropout_keys), batch, teacher_scores)
        return loss_from_features(encoded, hyper, state.step, step_config=step_config, mesh=mesh)

    trained_params = optim.select_trainable(state.params, lr_multipliers)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for `constrain_to_batch`
        teacher_scores = None
        if "teacher_scores" in step_config.loss_needs:
            teacher = ema_params(state, lr_multipliers)
            features = encode(teacher, {"image": None, "text": None}, None)
            teacher_scores = score_batch(teacher, *features, step_config=step_config, mesh=mesh)
        loss_value, grads = jax.value_and_grad(compute_loss)(trained_params, teacher_scores)
    optimizer = step_config.make_optimizer(hyper)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained_params)
    trained_params = optax.apply_updates(trained_params, updates)
    ema = None if state.ema is None else ema_update(state.ema, trained_params, state.step, hyper.ema_decay)
    metrics = {"loss": loss_value, "grad_norm": optax.tree.norm(grads)}
    params = optim.merge(trained_params, frozen_params)
    new_state = TrainState(state.step + 1, params, state.constants, opt_state, ema)
    return new_state, jax.tree.map(jnp.float32, metrics)


def encode_batch(batch: dict, params, keys: dict, region_dropout_keys, *, step_config: StepConfig, mesh):
    """Returns the Features of the images and of the texts of a batch. `keys` are the dropout keys by kind, None for a
    tower without dropout. If `region_dropout_keys` is None, no regions are left out."""
    encode = functools.partial(encode_in_chunks, mesh=mesh, chunks=step_config.grad_cache_chunks)
    encode_images = functools.partial(step_config.model.encode_images, params)
    encode_texts = functools.partial(step_config.model.encode_texts, params)
    images = encode(
        lambda key, x, row: encode_images(x, key, row), keys["image"], (batch["images"], region_dropout_keys)
    )
    texts = encode(
        lambda key, ids, mask: encode_texts(ids, mask, key), keys["text"], (batch["text"], batch["text_mask"])
    )
    return images, texts


def score_batch(params, images, texts, *, step_config: StepConfig, mesh):
    """Computes the scores of all pairs of a batch, float32 `(B, B)`, by the ring; hubness offsets are subtracted."""
    score, score_params, (image_offsets, text_offsets) = _prepare_scoring(params, images, texts, step_config)
    scores = ring_scores(score, score_params, images, texts, mesh)
    return scores - image_offsets[:, None] - text_offsets


def _prepare_scoring(params, images, texts, step_config: StepConfig):
    """Returns the function that scores blocks, its parameters, and the hubness offsets of images and of texts."""
    # Without the towers: the ring need not carry their parameters.
    score_params = {name: params[name] for name in ("matcher", "loss")}
    score_params["constants"] = {k: v for k, v in params["constants"].items() if k == "matcher"}
    score = make_block_scorer(step_config.model, step_config.score_chunk_mib, step_config.score_tile_mib)
    # (B,), (B,): an offset depends on one item alone, so it is computed outside the ring and its tiles.
    return score, score_params, step_config.model.hub_offsets(params, images, texts)


def loss_from_features(encoded: EncodedBatch, hyper: Hyperparameters, step, *, step_config: StepConfig, mesh):
    """Computes the loss of an encoded batch, a scalar. The scores of all pairs are computed by the ring, or on each
    device alone (`negatives`), for a loss without `loss_needs`. With `skip_equal_captions`, equal captions are no
    negatives of each other."""
    params, images, texts, image_index = encoded.params, encoded.images, encoded.texts, encoded.batch["image_index"]
    text_digest = encoded.batch["text_digest"] if step_config.skip_equal_captions else None

    def loss_from_scores(loss_params, scores, image_index, text_digest, **inputs):
        positives = losses.positives_mask(image_index, text_digest)
        return step_config.loss(loss_params, scores, positives, hyper, step, **inputs)

    if step_config.negatives == "local":
        score, score_params, offsets = _prepare_scoring(params, images, texts, step_config)

        def loss_on_device(params, scores, offsets, image_index, text_digest):
            image_offsets, text_offsets = offsets
            scores = scores - image_offsets[:, None] - text_offsets
            return loss_from_scores(params["loss"], scores, image_index, text_digest)

        items = offsets, image_index, text_digest
        return local_loss(score, loss_on_device, score_params, images, texts, items=items, mesh=mesh)
    scores = score_batch(params, images, texts, step_config=step_config, mesh=mesh)
    inputs = compute_loss_inputs(step_config.loss_needs, encoded)
    return loss_from_scores(params["loss"], scores, image_index, text_digest, **inputs)


def row_keys(seed, epochs, caption_indices, views):
    """Returns a random key for each row of a batch, `(B,)`, for region dropout. A key depends on (seed, epoch, caption,
    view) alone, not on the place of the row in its batch."""
    # A step number that no run reaches: these keys must differ from the dropout keys.
    key = jax.random.fold_in(jax.random.key(seed), 0x7FFFFFFF)

    def make_key(epoch, caption, view):
        pair_key = jax.random.fold_in(jax.random.fold_in(key, epoch), caption)
        return jnp.where(view > 0, jax.random.fold_in(pair_key, view), pair_key)

    return jax.vmap(make_key)(epochs, caption_indices, views)


def compile_step(mesh, state, step_config: StepConfig):
    """Returns `train_step(state, batch, hyperparameters)` jitted on the mesh. The batch is split by rows; the state (or
    its shapes) is sharded by the rules of `runtime/sharding.py` and donated."""
    state_sharding = param_shardings(mesh, state)
    return jax.jit(
        functools.partial(train_step, step_config=step_config, mesh=mesh),
        in_shardings=(state_sharding, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(state_sharding, replicated(mesh)),
        donate_argnums=0,
    )
