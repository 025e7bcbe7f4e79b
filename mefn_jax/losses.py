"""Losses of a score matrix (docs/method.md, section 11): pure functions `loss(scores, positives, scale, bias)`.

Further options are keyword arguments. Scores are `(B, B)`; row k and column k belong to pair k, so the diagonal holds
the pairs' positives. `positives` bool `(B, B)` marks every true pair, also another caption of the same image, which is
never a negative (Eq. 41). Losses are summed over anchors and divided by B. `scale` (a logarithm) and `bias` are the
learned parameters of a loss, None where it has none.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

CLIP = {"scale": math.log(1 / 0.07)}  # Radford et al. 2021, section 2.5: a temperature of 0.07
SIGLIP = {"scale": math.log(10.0), "bias": -10.0}  # Zhai et al. 2023, Algorithm 1


def use_no_options(config, hyper, step) -> dict:
    """Returns the keyword arguments of a loss without options: none."""
    return {}


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss and what it needs.

    Attributes:
        compute: the loss, `(scores, positives, scale, bias, **options) -> scalar`.
        initial: initial values of its learned parameters: `scale`, a logarithm, and `bias`; both optional.
        options: function `(config.loss, hyperparameters, step) -> options`, the keyword arguments of `compute`.
    """

    compute: Callable
    initial: dict[str, float] = dataclasses.field(default_factory=dict)
    options: Callable = use_no_options


def make_loss(config):
    """Returns the loss of `config.loss`: a function `(params, scores, positives, hyper, step) -> scalar`. `params` are
    the learned parameters of the loss, `hyper` the `Hyperparameters` of the run."""
    loss = LOSSES[config.name]

    def compute(params, scores, positives, hyper, step):
        options = loss.options(config, hyper, step)
        return loss.compute(scores, positives, params.get("scale"), params.get("bias"), **options)

    return compute


def positives_mask(image_index, text_digest=None):
    """Returns the mask of the true pairs of a batch, bool `(B, B)`, from the image index `(B,)` of each pair
    (docs/method.md, Eq. 41). With the digests `(B, 2)` of the captions, equal captions are true of each other's images
    too."""
    positives = image_index[:, None] == image_index[None, :]
    if text_digest is None:
        return positives
    return positives | jnp.all(text_digest[:, None] == text_digest[None, :], -1)


def triplet(scores, positives, scale, bias, *, margin, hardest, anchors):
    """Computes the triplet loss, a scalar: hinges on `margin + s_neg - s_pos` (docs/method.md, Eqs. 42 and 43; MEFN,
    Eq. 2; VSE++, Faghri et al. 2018, Eqs. 5 and 6).

    `hardest` in [0, 1] is y of Eq. 43: 0 is the sum over all negatives, 1 the hardest negative alone. `anchors`: "both"
    directions, "image" (negatives among the texts; MEFN's Eq. 2 as printed) or "text". Scale and bias are not used.
    """
    s_pos = jnp.diagonal(scores)  # (B,)
    total = 0.0
    if anchors in ("both", "image"):
        total += _mix_hinges(jnp.where(positives, 0.0, jnp.maximum(margin + scores - s_pos[:, None], 0.0)), hardest)
    if anchors in ("both", "text"):
        total += _mix_hinges(jnp.where(positives.T, 0.0, jnp.maximum(margin + scores.T - s_pos[:, None], 0.0)), hardest)
    return total


def info_nce(scores, positives, scale, bias):
    """Computes InfoNCE, a scalar: the cross entropy of each pair against its row and its column of the scores, averaged
    (docs/method.md, Eq. 45; CLIP, Radford et al. 2021). The logits are `exp(scale) * scores`, with a factor of at most
    100; bias is not used."""
    logits = jnp.exp(_clamp(scale)) * scores
    positive_logits = jnp.diagonal(logits)  # (B,)
    logits = jnp.where(_mask_other_positives(positives), -1e30, logits)
    return sum(jnp.mean(jax.nn.logsumexp(logits, axis) - positive_logits) for axis in (0, 1)) / 2


def siglip(scores, positives, scale, bias):
    """Computes SigLIP's loss, a scalar: a binary cross entropy for every pair on its own (docs/method.md, Eq. 47;
    Zhai et al. 2023, Algorithm 1). It is `-ln sigmoid(y (exp(scale) scores + bias))` with y = 1 on the diagonal and -1
    elsewhere, summed over the texts and averaged over the images. The factor `exp(scale)` is at most 100."""
    logits = jnp.exp(_clamp(scale)) * scores + bias
    costs = jnp.where(jnp.eye(len(scores), dtype=bool), jax.nn.softplus(-logits), jax.nn.softplus(logits))
    return jnp.mean(jnp.sum(jnp.where(_mask_other_positives(positives), 0.0, costs), 1))


def _clamp(scale):
    """Clamps a logarithmic scale at ln 100 in the forward pass only: the gradient passes through, so that a scale above
    the limit can come back (docs/method.md, Eq. 46)."""
    return scale - jax.lax.stop_gradient(jnp.maximum(scale - math.log(100.0), 0.0))


def _mask_other_positives(positives):
    """Returns the mask of the true pairs off the diagonal: neither the positive of their row nor negatives."""
    return positives & ~jnp.eye(len(positives), dtype=bool)


def _mix_hinges(costs, hardest):
    """Returns one line of docs/method.md, Eq. 43: the mean over anchors (rows) of the hinges `costs (B, B)`, 0 at
    positives, from their sum (`hardest` 0) to the largest alone (1)."""
    return jnp.mean((1 - hardest) * jnp.sum(costs, 1) + hardest * jnp.max(costs, 1))


def hard_negative_weight(step, ramp):
    """Returns the weight of the hardest negative at `step`, float32: it rises linearly from 0 to 1 in `ramp` steps
    (docs/method.md, Eq. 44).

    With hardest negatives from the first step (a ramp of 0), training can collapse: all scores become equal. A negative
    ramp keeps the weight at 0, the sum over all negatives.
    """
    rising = jnp.minimum(step / jnp.maximum(ramp, 1), 1.0)
    return jnp.where(ramp < 0, 0.0, jnp.where(ramp == 0, 1.0, rising)).astype(jnp.float32)


def triplet_options(config, hyper, step) -> dict:
    """Returns the options of the triplet loss at a step."""
    hardest = hard_negative_weight(step, hyper.hard_negative_ramp)
    return {"margin": hyper.margin, "hardest": hardest, "anchors": config.anchors}


LOSSES = {
    "triplet": Loss(triplet, options=triplet_options),
    "info_nce": Loss(info_nce, CLIP),
    "siglip": Loss(siglip, SIGLIP),
}
# The values that an option may have.
LOSS_CHOICES = {
    "loss.name": tuple(LOSSES),
    "loss.anchors": ("both", "image", "text"),
    "loss.negatives": ("global", "local"),
}
