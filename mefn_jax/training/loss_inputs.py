"""Computes what some losses need of a batch beside its scores and positives (`needs` of `losses.Loss`). B rows."""

import dataclasses

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
    """

    model: Model
    params: dict
    images: Features
    texts: Features
    batch: dict


def mark_same_pair(encoded: EncodedBatch) -> jax.Array:
    """Returns which rows are views of one pair, bool `(B, B)`: rows of the same caption in the same epoch."""
    caption, epoch = encoded.batch["caption_index"], encoded.batch["epoch"]
    return (caption[:, None] == caption) & (epoch[:, None] == epoch)


# Functions of an EncodedBatch by the keyword argument of the loss that they give.
LOSS_INPUTS = {
    "same_pair": mark_same_pair,
}


def compute_loss_inputs(needs: tuple[str, ...], encoded: EncodedBatch) -> dict:
    """Returns the inputs of a loss that `needs` names, as keyword arguments."""
    return {name: LOSS_INPUTS[name](encoded) for name in needs}
