"""How much arithmetic a train step is, counted in the traced program rather than in the compiled one: XLA's own count
takes the body of a loop once.

Matrix products and convolutions are counted, two FLOPs a multiplication. A step is three times its forward pass, one
for a tower that is frozen; what is computed again to save memory is not counted (so that MFU is of useful work).
"""

import math

import jax
import numpy as np
from jax.extend import core

from mefn_jax import optim


def step_flops(recipe, mesh, params, batch: dict) -> dict[str, float]:
    """FLOPs a step by part: {images, texts, scores}. `params` and `batch` may be shapes; `recipe` as for a step."""
    model = recipe.model
    images, texts = batch["images"], (batch["text"], batch["text_mask"])
    features = jax.eval_shape(model.encode_images, params, images), jax.eval_shape(model.encode_texts, params, *texts)
    forward = {
        "images": count_flops(model.encode_images, params, images),
        "texts": count_flops(model.encode_texts, params, *texts),
        "scores": count_flops(model.score, params, *features),
    }
    if recipe.negatives == "local":  # each device scores its own pairs alone
        forward["scores"] /= mesh.size
    frozen = [
        part
        for part, factors in (("images", recipe.factors["image"]), ("texts", recipe.factors["text"]))
        if not optim.is_trained(factors.get("backbone", factors))
    ]
    return {part: count if part in frozen else 3 * count for part, count in forward.items()}


def count_flops(function, *args) -> float:
    """FLOPs of `function(*args)`, of which only the shapes count."""
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr) -> float:
    return sum(_equation_flops(e) for e in jaxpr.eqns)


def _equation_flops(e) -> float:
    if e.primitive.name == "dot_general":
        (contracted, _), _ = e.params["dimension_numbers"]
        left = e.invars[0].aval.shape
        return 2.0 * math.prod(e.outvars[0].aval.shape) * math.prod(left[k] for k in contracted)
    if e.primitive.name == "conv_general_dilated":
        kernel = e.invars[1].aval.shape
        outputs = kernel[e.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(e.outvars[0].aval.shape) * math.prod(kernel) / outputs
    inner = [_jaxpr_flops(j) for value in e.params.values() for j in _programs(value)]
    if e.primitive.name == "cond":
        return max(inner)
    return sum(inner) * (e.params["length"] if e.primitive.name == "scan" else 1)


def _programs(value):
    """The programs within a parameter of an equation."""
    for one in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(one, core.ClosedJaxpr):
            yield one.jaxpr
        elif isinstance(one, core.Jaxpr):
            yield one


def si_format(number: float) -> str:
    """A number with a prefix: "1.2 T"."""
    power = min(5, max(0, int(np.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}"
