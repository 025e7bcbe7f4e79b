"""Losses of a score matrix (docs/method.md, section 11): pure functions `loss(scores, positives, scale, bias)`.

Further options are keyword arguments, and so is what a loss needs beside the scores (`Loss.needs`). Scores are
`(B, B)`; row k and column k belong to one pair, so the diagonal holds the pairs' positives. `positives` bool `(B, B)`
marks every true pair, also another caption of the same image, which is never a negative (Eq. 41). Losses are summed
over anchors and divided by B. `scale` (a logarithm) and `bias` are the learned parameters of a loss, None where it has
none.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mefn_jax.errors import ConfigError
from mefn_jax.features import EPS

HECT_MARGIN, HECT_TEMPERATURE, HECT_CONTRAST = 1.0, 0.5, 0.5  # of MATE's code: in distances; of softplus; its weight
DISTILL_WEIGHT = 0.5  # of MATE's code
DISTILL_TEMPERATURE = 0.07  # Li et al. 2021 (ALBEF), retrieval on Flickr30K
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
        needs: names of LOSS_INPUTS in `training/loss_inputs.py`: further keyword arguments of `compute`, which the
            train step computes from the whole batch.
    """

    compute: Callable
    initial: dict[str, float] = dataclasses.field(default_factory=dict)
    options: Callable = use_no_options
    needs: tuple[str, ...] = ()


def make_loss(config):
    """Returns the loss of `config.loss`: a function `(params, scores, positives, hyper, step, **inputs) -> scalar`.
    `params` are the learned parameters of the loss, `hyper` the `Hyperparameters` of the run, `inputs` what the loss
    `needs`."""
    loss = LOSSES[config.name]

    def compute(params, scores, positives, hyper, step, **inputs):
        options = loss.options(config, hyper, step)
        return loss.compute(scores, positives, params.get("scale"), params.get("bias"), **options, **inputs)

    return compute


def check_loss(config) -> None:
    """Raises ConfigError if a loss of `config.loss` that needs the whole batch gets the rows of one device."""
    needs = LOSSES[config.name].needs
    if needs and config.negatives == "local":
        raise ConfigError(
            f"loss.negatives=local: loss.name={config.name} needs {', '.join(needs)} of the whole batch; set it to "
            "global"
        )


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
    return _hinge_both_ways(scores, positives, s_pos, s_pos, margin, hardest, anchors)


def sel(scores, positives, scale, bias, *, same_pair, **options):
    """Computes SEL, a scalar: the triplet loss, with the lowest score among the views of the anchor's pair in place of
    its positive (docs/method.md, Eq. 94; ESA, Zhu et al. 2023). `same_pair` bool `(B, B)` marks the views of one pair;
    with one view, the loss is `triplet`, whose options it has."""
    own = jnp.where(same_pair, scores, jnp.inf)
    return _hinge_both_ways(scores, positives, jnp.min(own, 1), jnp.min(own, 0), **options)


def _hinge_both_ways(scores, positives, image_positive, text_positive, margin, hardest, anchors):
    """Returns the triplet loss for given scores `(B,)` of each image's positive and of each text's."""
    total = 0.0
    if anchors in ("both", "image"):
        costs = jnp.maximum(margin + scores - image_positive[:, None], 0.0)
        total += _mix_hinges(jnp.where(positives, 0.0, costs), hardest)
    if anchors in ("both", "text"):
        costs = jnp.maximum(margin + scores.T - text_positive[:, None], 0.0)
        total += _mix_hinges(jnp.where(positives.T, 0.0, costs), hardest)
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


def info_nce_triplet(scores, positives, scale, bias, *, triplet_weight, **options):
    """Computes the sum of both losses, a scalar: InfoNCE and `triplet_weight` times the triplet loss, whose options are
    those of `triplet` (docs/method.md, Eq. 79). Bias is not used."""
    triplets = triplet(scores, positives, None, None, **options)
    return info_nce(scores, positives, scale, bias) + triplet_weight * triplets


def info_nce_triplet_options(config, hyper, step) -> dict:
    """Returns the options of the sum of InfoNCE and the triplet loss at a step."""
    return triplet_options(config, hyper, step) | {"triplet_weight": config.triplet_weight}


def mine_hardest(scores, positives):
    """Returns the hardest negatives of a batch: the position of each image's text and of each text's image with the
    largest score among negatives, int32 `(B,)` each, the first of equal ones; no gradient passes. 0 where an item has
    no negative."""
    scores = jax.lax.stop_gradient(jnp.where(positives, -jnp.inf, scores))
    return jnp.argmax(scores, 1), jnp.argmax(scores, 0)


def fuse_hardest(scores, positives, embeddings, fused_similarity):
    """Returns the fused similarities of the pairs, of each image with its hardest text, and of each text with its
    hardest image, `(B,)` each (docs/method.md, Eq. 103): 3B pairs are fused instead of B^2. The last two are -inf where
    an item has no negative."""
    v, t = embeddings
    text, image = mine_hardest(scores, positives)
    has_negative = ~jnp.all(positives, 1)  # positives are symmetric
    negatives = fused_similarity(v, t[text]), fused_similarity(v[image], t)
    return fused_similarity(v, t), *(jnp.where(has_negative, x, -jnp.inf) for x in negatives)


def hect(scores, positives, embeddings, fused_similarity):
    """Computes HECT, a scalar: a triplet and a contrastive loss of fused pairs, whose negative is the hardest of both
    modalities (docs/method.md, Eqs. 103 to 105; MATE, Zhou and Wang 2025, as evidently meant)."""
    pair, *cross = fuse_hardest(scores, positives, embeddings, fused_similarity)
    total = 0.0
    for own, negative in zip(embeddings, cross, strict=True):
        within = jnp.max(jnp.where(positives, -jnp.inf, own @ own.T), 1)
        total += jnp.mean(_contrast(pair, jnp.maximum(negative, within), HECT_MARGIN))
    return total / 2


def contrast_hardest(scores, positives, embeddings, fused_similarity):
    """Computes the contrastive part of HECT alone, a scalar, with negatives of the other modality alone."""
    pair, *cross = fuse_hardest(scores, positives, embeddings, fused_similarity)
    return sum(jnp.mean(_contrast(pair, negative, None)) for negative in cross) / 2


def _contrast(pair, negative, margin):
    """Returns the costs `(B,)` of anchors by the similarities of their pair and of their negative (docs/method.md,
    Eq. 105), 0 where the negative is -inf; without a `margin`, the contrastive term alone."""
    has_negative = negative > -jnp.inf
    negative = jnp.where(has_negative, negative, -1.0)
    costs = HECT_CONTRAST * jax.nn.softplus((negative - pair) / HECT_TEMPERATURE)
    if margin is not None:
        costs += jnp.maximum(chord_length(pair) - chord_length(negative) + margin, 0.0)
    return jnp.where(has_negative, costs, 0.0)


def chord_length(cosine):
    """Returns the distance of two unit vectors with this cosine. Its gradient at 1 is zero instead of NaN."""
    square = 2 - 2 * cosine
    positive = square > EPS
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def distill(scores, teacher_scores):
    """Computes the distillation, a scalar: the divergence of the softmax over candidates from the teacher's, averaged
    over rows and over both directions (docs/method.md, Eq. 106). No gradient passes into the teacher."""
    total = 0.0
    for axis in (0, 1):
        logits, teacher_logits = scores / DISTILL_TEMPERATURE, teacher_scores / DISTILL_TEMPERATURE
        target = jax.lax.stop_gradient(jax.nn.log_softmax(teacher_logits, axis))
        divergence = jnp.sum(jnp.exp(target) * (target - jax.nn.log_softmax(logits, axis)), axis)
        total += jnp.mean(divergence)
    return total / 2


def make_mate_loss(fused: Callable | None = None, has_teacher: bool = True) -> Loss:
    """Returns the sum of SEL and, where asked for, of `fused(scores, positives, embeddings, fused_similarity)`, which
    is `hect` or `contrast_hardest`, and of DISTILL_WEIGHT times the distillation (docs/method.md, section 19)."""

    def compute(
        scores, positives, scale, bias, *, embeddings=None, fused_similarity=None, teacher_scores=None, **options
    ):
        total = sel(scores, positives, scale, bias, **options)
        if fused is not None:
            total += fused(scores, positives, embeddings, fused_similarity)
        if has_teacher:
            total += DISTILL_WEIGHT * distill(scores, teacher_scores)
        return total

    needs = ("same_pair", *(("embeddings", "fused_similarity") if fused else ()))
    return Loss(compute, options=triplet_options, needs=(*needs, "teacher_scores") if has_teacher else needs)


LOSSES = {
    "triplet": Loss(triplet, options=triplet_options),
    "info_nce": Loss(info_nce, CLIP),
    "info_nce_triplet": Loss(info_nce_triplet, CLIP, info_nce_triplet_options),
    "siglip": Loss(siglip, SIGLIP),
    "sel": Loss(sel, options=triplet_options, needs=("same_pair",)),
    "sel_hect_distill": make_mate_loss(hect),
    "sel_hect": make_mate_loss(hect, has_teacher=False),
    "sel_contrast_distill": make_mate_loss(contrast_hardest),
    "sel_distill": make_mate_loss(),
}
# The values that an option may have.
LOSS_CHOICES = {
    "loss.name": tuple(LOSSES),
    "loss.anchors": ("both", "image", "text"),
    "loss.negatives": ("global", "local"),
}
