"""AdamW with warm-up and cosine, and gradient clipping."""

import jax
import optax


def schedule(learning_rate: float, steps: int, warmup: float) -> optax.Schedule:
    """Rises linearly over `warmup * steps` steps, then falls as a cosine to 0 at `steps`."""
    warm = max(1, round(warmup * steps))
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm, max(steps, warm + 1))


def adamw(learning_rate: optax.Schedule, weight_decay: float, clip_norm: float) -> optax.GradientTransformation:
    """AdamW after clipping by global norm. Matrices decay; biases, norms and scalars (lambda, kappa, g) do not."""

    def decays(params):
        # By name too: the bias of a projection to several heads is a matrix (heads, width of a head).
        return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and path[-1].key != "bias", params)

    return optax.chain(
        optax.clip_by_global_norm(clip_norm), optax.adamw(learning_rate, weight_decay=weight_decay, mask=decays)
    )
