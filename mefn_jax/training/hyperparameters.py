"""Hyperparameters: the numbers that may differ between runs of one compiled step."""

import flax.struct
import jax
import numpy as np

from mefn_jax import optim


@flax.struct.dataclass
class Hyperparameters:
    """Scalars that the compiled step takes as an argument, so that a sweep over them compiles once. They are no part of
    the train state: a run that resumes uses those of its configuration.

    Attributes:
        learning_rate: peak of the schedule (docs/method.md, Eq. 52), float32.
        steps, warmup_steps: length of the schedule, and of the rise of the learning rate, int32.
        schedule_offset: by how many steps the schedule is ahead of the run's own count of steps, float32: 0 unless the
            batch size has changed in a run that is measured in epochs.
        weight_decay, clip_norm: of AdamW and of the gradient, float32.
        ema_decay: decay of the moving average (Eq. 54), float32.
        margin: of the triplet loss (Eq. 42), float32.
        hard_negative_ramp: of the triplet loss (Eq. 44), int32.
        seed: of the dropout, uint32.
    """

    learning_rate: jax.Array
    steps: jax.Array
    warmup_steps: jax.Array
    schedule_offset: jax.Array
    weight_decay: jax.Array
    clip_norm: jax.Array
    ema_decay: jax.Array
    margin: jax.Array
    hard_negative_ramp: jax.Array
    seed: jax.Array

    def learning_rate_at(self, step):
        """Returns the learning rate of a step, float32."""
        return optim.learning_rate_at(step + self.schedule_offset, self.learning_rate, self.steps, self.warmup_steps)


def hyperparameters_from_config(config, steps: int, schedule_offset: float = 0.0) -> Hyperparameters:
    """Returns the hyperparameters of a configuration, NumPy scalars; `steps` is the length of the schedule."""
    train, loss = config.train, config.loss
    return Hyperparameters(
        learning_rate=np.float32(train.learning_rate),
        steps=np.int32(steps),
        warmup_steps=np.int32(optim.count_warmup_steps(steps, train.warmup_fraction)),
        schedule_offset=np.float32(schedule_offset),
        weight_decay=np.float32(train.weight_decay),
        clip_norm=np.float32(train.clip_norm),
        ema_decay=np.float32(train.ema_decay),
        margin=np.float32(loss.margin),
        hard_negative_ramp=np.int32(loss.hard_negative_ramp),
        seed=as_seed(train.seed),
    )


def as_seed(seed: int) -> np.uint32:
    """Returns the seed as `jax.random.key` takes it inside a compiled program: its lowest 32 bits."""
    return np.uint32(seed & 0xFFFFFFFF)
