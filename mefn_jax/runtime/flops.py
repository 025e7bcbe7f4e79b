"""Arithmetic of a train step, counted in the traced program: XLA's own count of a compiled program takes the body of a
loop once.

Matrix products and convolutions count, with two FLOPs for a multiplication and its addition. A step costs three times
its forward pass; a frozen tower costs only its forward pass, and one with LoRA's adapters twice as much, because the
gradient passes through it. A teacher costs one more forward pass. Rematerialization does not count, so that MFU
measures useful work (docs/method.md, Eq. 55).
"""

import math

import jax
import numpy as np
from jax.extend import core

from mefn_jax import optim


def step_flops(step_config, mesh, params, batch: dict) -> dict[str, float]:
    """Returns the FLOPs of a step by part: `{images, texts, scores}`, and `fusion` for a loss that fuses some pairs.
    `params` and `batch` may be shapes; `step_config` is that of `train_step`."""
    model, needs = step_config.model, step_config.loss_needs
    images, texts = batch["images"], (batch["text"], batch["text_mask"])
    features = jax.eval_shape(model.encode_images, params, images), jax.eval_shape(model.encode_texts, params, *texts)
    forward = {
        "images": count_flops(model.encode_images, params, images),
        "texts": count_flops(model.encode_texts, params, *texts),
        "scores": count_flops(model.train_score if model.has_train_score else model.score, params, *features),
    }
    if step_config.negatives == "local":  # each device scores only its own pairs
        forward["scores"] /= mesh.size
    passes = {f"{tower}s": _count_passes(step_config.lr_multipliers, tower) for tower in ("image", "text")}
    passes["scores"] = 3
    if "teacher_scores" in needs:
        passes = {part: count + 1 for part, count in passes.items()}
    if "fused_similarity" in needs:  # of the true pairs, and of the hardest negatives in both directions
        vectors = (jax.eval_shape(model.embed, params, x) for x in features)
        forward["fusion"], passes["fusion"] = 3 * count_flops(model.fused_similarity, params, *vectors), 3
    return {part: passes[part] * count for part, count in forward.items()}


def _count_passes(lr_multipliers: dict, tower: str) -> int:
    """Returns how many times the FLOPs of its forward pass an encoder costs in a step."""
    multipliers = lr_multipliers[tower]
    if optim.is_trained(multipliers.get("backbone", multipliers)):
        return 3
    return 2 if optim.is_trained(lr_multipliers.get("lora", {}).get(tower, {})) else 1


def count_flops(function, *args) -> float:
    """Returns the FLOPs of `function(*args)`. The arguments may be shapes."""
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr) -> float:
    """Returns the FLOPs of a jaxpr."""
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> float:
    """Returns the FLOPs of one equation of a jaxpr, including the jaxprs inside it. Of the branches of a `cond`, the
    largest counts."""
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[k] for k in contracted)
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
    inner = [_jaxpr_flops(jaxpr) for value in equation.params.values() for jaxpr in _inner_jaxprs(value)]
    if equation.primitive.name == "cond":
        return max(inner)
    return sum(inner) * (equation.params["length"] if equation.primitive.name == "scan" else 1)


def _inner_jaxprs(value):
    """Yields the jaxprs within a parameter of an equation."""
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, core.ClosedJaxpr):
            yield item.jaxpr
        elif isinstance(item, core.Jaxpr):
            yield item


def si_format(number: float) -> str:
    """Formats a number with an SI prefix: "1.2 T"."""
    power = min(5, max(0, int(np.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}"
