"""AdamW with warm-up and cosine, gradient clipping, learning rates by path, and freezing."""

import re

import jax
import optax

from mefn_jax.errors import ConfigError


def lr_schedule(learning_rate: float, steps: int, warmup_fraction: float) -> optax.Schedule:
    """Rises linearly over `warmup_fraction * steps` steps, then falls as a cosine to 0 at `steps`."""
    warm = max(1, round(warmup_fraction * steps))
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm, max(steps, warm + 1))


def adamw(
    learning_rate: optax.Schedule, weight_decay: float, clip_norm: float, factors: dict | None = None
) -> optax.GradientTransformation:
    """AdamW after clipping by global norm. Matrices decay; biases, norms and scalars (lambda, kappa, g) do not.
    `factors` (see `rate_factors`) multiply each parameter's learning rate."""

    def decays(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    moving = None if factors is None else trainable(factors, factors)  # None where frozen, as in the updates

    def scale(updates, _):
        return updates if moving is None else jax.tree.map(lambda u, f: u * f, updates, moving)

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, weight_decay=weight_decay, mask=decays),
        optax.stateless(scale),
    )


def lr_multipliers(params, multipliers: tuple[str, ...], layer_decay: float) -> dict:
    """Each parameter's factor of the learning rate, a tree like `params` of Python numbers.

    `multipliers` are "regex:factor"; the first whose regex is found in a path ("image/backbone/layer_0/norm_1/scale")
    counts, else 1. In a Transformer of n layers, layer k has `layer_decay ** (n - 1 - k)` besides, what comes before
    the layers `layer_decay ** n`. Raises ConfigError for a rule that is malformed or that fits no parameter.
    """
    rules, used = [_rule(text) for text in multipliers], set()
    towers = {kind: params[kind].get("backbone", {}) for kind in ("image", "text")}

    def factor(path, _):
        name = "/".join(part.key for part in path)
        number = next((k for k, (regex, _) in enumerate(rules) if regex.search(name)), None)
        used.add(number)
        if re.search(r"_norm/(mean|var)$", name):  # a pretrained ResNet's stored statistics are constants
            return 0.0
        return (1.0 if number is None else rules[number][1]) * _decay(name, towers, layer_decay)

    factors = jax.tree_util.tree_map_with_path(factor, params)
    for number, text in enumerate(multipliers):
        if number not in used:
            raise ConfigError(
                f"train.lr_multipliers: {text!r} fits no parameter that the rules before it leave; paths look like "
                "image/backbone/layer_0/attention/query/kernel"
            )
    return factors


def _rule(text: str) -> tuple[re.Pattern, float]:
    regex, separator, value = text.rpartition(":")
    try:
        rule = re.compile(regex), float(value)
    except (re.error, ValueError) as e:
        raise ConfigError(f"train.lr_multipliers: {text!r} is not a regex:factor ({e})") from None
    if not separator or not regex or not rule[1] >= 0:
        raise ConfigError(f"train.lr_multipliers: {text!r} is not a regex:factor with a factor of at least 0")
    return rule


def _layers(backbone: dict) -> int:
    return sum(bool(re.fullmatch(r"layer_\d+", name)) for name in backbone)


def _decay(name: str, towers: dict, layer_decay: float) -> float:
    found = re.match(r"(image|text)/backbone/(?:layer_(\d+)/|(norm|pooler)/)?", name)
    depth = _layers(towers[found[1]]) if found else 0
    if not depth:
        return 1.0
    if found[2] is not None:
        return layer_decay ** (depth - 1 - int(found[2]))
    # BERT's one norm of its own follows the embeddings; a pre-norm tower's follows the layers.
    last = ("pooler",) if "segments" in towers[found[1]] else ("pooler", "norm")
    return 1.0 if found[3] in last else layer_decay**depth


def is_trained(factors) -> bool:
    """Is any parameter of this part of the tree trained?"""
    return any(f > 0 for f in jax.tree.leaves(factors))


def trainable(tree, factors):
    """`tree` with None at the frozen parameters (factor 0), so that they are neither differentiated nor given any
    state of the optimiser."""
    return jax.tree.map(lambda value, f: value if f > 0 else None, tree, factors)


def frozen(tree, factors):
    """The other part: None at the trainable parameters."""
    return jax.tree.map(lambda value, f: None if f > 0 else value, tree, factors)


def merge(first, second):
    """A whole tree again from two parts."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None)
