"""Losses of a score matrix. Each is a pure function `loss(scores, positives, scale, bias)`, further options by keyword.

Scores are `(B, B)`, row k and column k belong to pair k: the diagonal is the pair's own positive. `positives` bool
`(B, B)` marks every true pair, also another caption of the same image, which is never a negative. Losses are summed
over anchors and divided by B. `scale` and `bias` are the loss's learned parameters, None where it has none.
"""

import functools
import math

import jax
import jax.numpy as jnp

# The names that an option may have.
LOSS_CHOICES = {
    "loss.name": ("triplet", "info_nce", "siglip"),
    "loss.anchors": ("both", "image", "text"),
    "loss.negatives": ("global", "local"),
}

CLIP = {"scale": math.log(1 / 0.07)}  # Radford et al. 2021, section 2.5: a temperature of 0.07
SIGLIP = {"scale": math.log(10.0), "bias": -10.0}  # Zhai et al. 2023, Algorithm 1


def make_loss(config):
    """The loss of `config.loss` as it is at a step: a function `step -> loss(scores, positives, scale, bias)`."""
    without_options = {"info_nce": info_nce, "siglip": siglip}
    if config.name in without_options:
        return lambda step: without_options[config.name]

    def at(step):
        hardest = hard_negative_weight(step, config.hard_negative_ramp)
        return functools.partial(triplet, margin=config.margin, hardest=hardest, anchors=config.anchors)

    return at


def initial_params(config) -> dict[str, float]:
    """The loss's own parameters as they begin: `scale`, a logarithm, and SigLIP's `bias`."""
    return {"triplet": {}, "info_nce": CLIP, "siglip": SIGLIP}[config.name]


def positives_mask(image_ids):
    """Which pairs of a batch are true: bool `(B, B)`, from the image ids of its pairs `(B,)`."""
    return image_ids[:, None] == image_ids[None, :]


def triplet(scores, positives, scale, bias, *, margin, hardest, anchors):
    """Hinge on `margin + s_neg - s_pos` (MEFN, Eq. 2; VSE++, Faghri 2018, Eqs. 5 and 6).

    `hardest` in [0, 1] mixes the two forms: 0 is the sum over all negatives, 1 the hardest negative alone. `anchors`:
    "both" directions, "image" (negatives among the texts; Eq. 2 as printed) or "text". Scale and bias are not used.
    Returns a scalar.
    """
    own = jnp.diagonal(scores)  # (B,)
    total = 0.0
    if anchors in ("both", "image"):
        total += _hinges(jnp.where(positives, 0.0, jnp.maximum(margin + scores - own[:, None], 0.0)), hardest)
    if anchors in ("both", "text"):
        total += _hinges(jnp.where(positives.T, 0.0, jnp.maximum(margin + scores.T - own[:, None], 0.0)), hardest)
    return total


def info_nce(scores, positives, scale, bias):
    """Cross entropy of each pair among the batch, both directions averaged (CLIP, Radford et al. 2021). The logits are
    `exp(scale) * scores`, the factor at most 100; bias is not used. Returns a scalar."""
    logits = jnp.exp(_clamp(scale)) * scores
    own = jnp.diagonal(logits)  # (B,)
    logits = jnp.where(_other_positives(positives), -1e30, logits)
    return sum(jnp.mean(jax.nn.logsumexp(logits, axis) - own) for axis in (0, 1)) / 2


def siglip(scores, positives, scale, bias):
    """Each pair a yes or no of its own (SigLIP, Zhai et al. 2023, Algorithm 1): `-ln sigmoid(z (exp(scale) scores +
    bias))`, z = 1 on the diagonal and -1 elsewhere, summed over the texts and averaged over the images. The factor is
    at most 100. Returns a scalar."""
    logits = jnp.exp(_clamp(scale)) * scores + bias
    costs = jnp.where(jnp.eye(len(scores), dtype=bool), jax.nn.softplus(-logits), jax.nn.softplus(logits))
    return jnp.mean(jnp.sum(jnp.where(_other_positives(positives), 0.0, costs), 1))


def _clamp(scale):
    """The logarithm of a factor of at most 100: cut in value but not in gradient, so that a scale beyond the limit
    finds its way back."""
    return scale - jax.lax.stop_gradient(jnp.maximum(scale - math.log(100.0), 0.0))


def _other_positives(positives):
    """The true pairs off the diagonal, which are neither this row's positive nor its negatives."""
    return positives & ~jnp.eye(len(positives), dtype=bool)


def _hinges(cost, hardest):
    """Mean over anchors (rows) of the mixed form; `cost` `(B, B)`, 0 at positives."""
    return jnp.mean((1 - hardest) * jnp.sum(cost, 1) + hardest * jnp.max(cost, 1))


def hard_negative_weight(step, hard_negative_ramp: int):
    """How much of the hardest-negative form to use at `step`: rises linearly from 0 to 1 in `hard_negative_ramp`.

    Hardest negatives from step 0 collapse (PEERS.md 3). `hard_negative_ramp < 0` keeps the sum of hinges for good.
    """
    if hard_negative_ramp < 0:
        return jnp.float32(0.0)
    if hard_negative_ramp == 0:
        return jnp.float32(1.0)
    return jnp.minimum(step / hard_negative_ramp, 1.0).astype(jnp.float32)
