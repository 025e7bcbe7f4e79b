"""Optimizer: AdamW with warmup and cosine decay, gradient clipping, learning rates by path, and freezing."""

import re

import jax
import jax.numpy as jnp
import optax

from mefn_jax.errors import ConfigError


def learning_rate_at(step, peak, steps, warmup_steps):
    """Returns the learning rate of a step, float32: a linear rise to `peak` over `warmup_steps` steps, then a cosine to
    0 at `steps` (docs/method.md, Eq. 52). All arguments may be arrays of a compiled step, so that one program serves
    every schedule. (optax's schedules need Python numbers.)"""
    rising = step / warmup_steps
    falling = jnp.clip((step - warmup_steps) / jnp.maximum(steps - warmup_steps, 1), 0.0, 1.0)
    return jnp.float32(peak * jnp.where(step < warmup_steps, rising, 0.5 * (1 + jnp.cos(jnp.pi * falling))))


def count_warmup_steps(steps: int, warmup_fraction: float) -> int:
    """Returns the number of steps with a rising learning rate, at least 1."""
    return max(1, round(warmup_fraction * steps))


def adamw(learning_rate, weight_decay, clip_norm, factors: dict | None = None) -> optax.GradientTransformation:
    """Returns AdamW after clipping by global norm. Matrices decay; biases, norms and scalars (lambda, kappa, g) do not.
    `learning_rate` is a function of the step. It, `weight_decay` and `clip_norm` may be arrays of a compiled step.
    `factors` (see `lr_multipliers`) multiply each parameter's learning rate."""

    def select_matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    # None where frozen, as in the updates.
    update_factors = None if factors is None else select_trainable(factors, factors)

    def scale_updates(updates, _):
        return updates if update_factors is None else jax.tree.map(lambda u, f: u * f, updates, update_factors)

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, weight_decay=weight_decay, mask=select_matrices),
        optax.stateless(scale_updates),
    )


def lr_multipliers(params, multipliers: tuple[str, ...], layer_decay: float) -> dict:
    """Returns the factor of each parameter's learning rate, a tree like `params` of Python numbers.

    `multipliers` are rules "regex:factor"; the first whose regex is found in a path
    ("image/backbone/layer_0/norm_1/scale") counts, else the factor is 1. In a Transformer of n layers, layer k has the
    additional factor `layer_decay ** (n - 1 - k)`, and everything before the layers `layer_decay ** n` (docs/method.md,
    Eq. 53). A tower with LoRA's adapters is frozen except for these (`lora/image/backbone/...`). Raises ConfigError for
    a rule that is malformed or that applies to no parameter.
    """
    rules, used_rules = [_parse_rule(text) for text in multipliers], set()
    towers = {kind: params[kind].get("backbone", {}) for kind in ("image", "text")}

    adapted = tuple(f"{kind}/backbone/" for kind in params.get("lora", {}))

    def compute_factor(path, _):
        name = "/".join(part.key for part in path)
        number = next((k for k, (regex, _) in enumerate(rules) if regex.search(name)), None)
        used_rules.add(number)
        if name.startswith(adapted):
            return 0.0
        return (1.0 if number is None else rules[number][1]) * _compute_layer_decay(name, towers, layer_decay)

    factors = jax.tree_util.tree_map_with_path(compute_factor, params)
    for number, text in enumerate(multipliers):
        if number not in used_rules:
            raise ConfigError(
                f"train.lr_multipliers: {text!r} matches no parameter that earlier rules leave; paths look like "
                "image/backbone/layer_0/attention/query/kernel"
            )
    return factors


def _parse_rule(text: str) -> tuple[re.Pattern, float]:
    """Parses a rule "regex:factor". Raises ConfigError if it is malformed."""
    regex, separator, value = text.rpartition(":")
    try:
        rule = re.compile(regex), float(value)
    except (re.error, ValueError) as e:
        raise ConfigError(f"train.lr_multipliers: {text!r} is not a regex:factor ({e})") from None
    if not separator or not regex or not rule[1] >= 0:
        raise ConfigError(f"train.lr_multipliers: {text!r} is not a regex:factor with a factor of at least 0")
    return rule


def _count_layers(backbone: dict) -> int:
    """Returns the number of Transformer layers among a backbone's parameters; 0 for other backbones."""
    return sum(bool(re.fullmatch(r"layer_\d+", name)) for name in backbone)


def _compute_layer_decay(name: str, towers: dict, layer_decay: float) -> float:
    """Computes the factor of layer decay of the parameter at path `name` (docs/method.md, Eq. 53)."""
    match = re.match(r"(?:lora/)?(image|text)/backbone/(?:layer_(\d+)/|(norm|pooler|head)/)?", name)
    depth = _count_layers(towers[match[1]]) if match else 0
    if not depth:
        return 1.0
    if match[2] is not None:
        return layer_decay ** (depth - 1 - int(match[2]))
    # BERT (the tower with segments) has its norm after the embeddings; pre-norm towers have it after the layers.
    after_layers = ("pooler", "head") if "segments" in towers[match[1]] else ("pooler", "head", "norm")
    return 1.0 if match[3] in after_layers else layer_decay**depth


def is_trained(factors) -> bool:
    """Returns whether any parameter of this part of the tree is trained (has a factor above 0)."""
    return any(f > 0 for f in jax.tree.leaves(factors))


def select_trainable(tree, factors):
    """Returns `tree` with None at the frozen parameters (factor 0), so that they are not differentiated and have no
    optimizer state."""
    return jax.tree.map(lambda value, f: value if f > 0 else None, tree, factors)


def select_frozen(tree, factors):
    """Returns `tree` with None at the trainable parameters: the counterpart of `select_trainable`."""
    return jax.tree.map(lambda value, f: None if f > 0 else value, tree, factors)


def merge(first, second):
    """Returns the whole tree from the two parts of `select_trainable` and `select_frozen`."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None)
