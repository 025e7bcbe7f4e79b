"""Computes what some losses need of a batch beside its scores and positives (`needs` of `losses.Loss`). B rows."""

import dataclasses
import functools

import jax

from mefn_jax.features import Features
from mefn_jax.model import Model


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """A batch in a train step, when its loss is computed.

    Attributes:
        model: the model.
        params: its variables, with respect to which the loss is differentiated.
        images, texts: Features of the B images and of the B texts; rows are split over the devices.
        batch: the arrays of the batch, of `pipeline.training_dataset`.
        teacher_scores: float32 `(B, B)`, the scores of the averaged parameters (`TrainState.ema`) for the same inputs,
            without dropout; None if the loss does not need them. They are no function of `params`.
    """

    model: Model
    params: dict
    images: Features
    texts: Features
    batch: dict
    teacher_scores: jax.Array | None = None


def mark_same_pair(encoded: EncodedBatch) -> jax.Array:
    """Returns which rows are views of one pair, bool `(B, B)`: rows of the same caption in the same epoch."""
    caption, epoch = encoded.batch["caption_index"], encoded.batch["epoch"]
    return (caption[:, None] == caption) & (epoch[:, None] == epoch)


def embed_batch(encoded: EncodedBatch) -> tuple[jax.Array, jax.Array]:
    """Returns the embeddings of the images and of the texts, float32 `(B, D)` each."""
    return encoded.model.embed(encoded.params, encoded.images), encoded.model.embed(encoded.params, encoded.texts)


# Functions of an EncodedBatch by the keyword argument of the loss that they give.
LOSS_INPUTS = {
    "same_pair": mark_same_pair,
    "embeddings": embed_batch,
    "fused_similarity": lambda encoded: functools.partial(encoded.model.fused_similarity, encoded.params),
    "teacher_scores": lambda encoded: encoded.teacher_scores,
}


def compute_loss_inputs(needs: tuple[str, ...], encoded: EncodedBatch) -> dict:
    """Returns the inputs of a loss that `needs` names, as keyword arguments."""
    return {name: LOSS_INPUTS[name](encoded) for name in needs}
