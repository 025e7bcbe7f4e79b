"""What training carries from step to step."""

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """`step` int32, the number of steps done; the parameters; the optimiser's state. No random key: it is folded from
    the seed and the step."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def create(model, optimizer, shapes, seed: int, sharding) -> TrainState:
    """A new state, made where `sharding` puts it. `shapes` are (pixels, ids, mask) as ShapeDtypeStructs."""

    def init():
        # Only the shapes matter: parameters do not depend on the values seen at init.
        params = model.init(jax.random.key(seed), *(jnp.ones(s.shape, s.dtype) for s in shapes))
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    return jax.jit(init, out_shardings=sharding)()


def count(params) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(p.size for p in jax.tree.leaves(params))
