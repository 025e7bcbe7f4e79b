"""What training carries from step to step."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mefn_jax import optim


@flax.struct.dataclass
class TrainState:
    """`step` int32, the number of steps done; the parameters; the optimiser's state. No random key: it is folded from
    the seed and the step."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def create(init, optimizer, factors, sharding) -> TrainState:
    """A new state of the parameters that `init()` makes, where `sharding` puts it; the optimiser has no state for
    those whose learning rate has factor 0."""

    def new():
        params = init()
        return TrainState(jnp.int32(0), params, optimizer.init(optim.trainable(params, factors)))

    return jax.jit(new, out_shardings=sharding)()


def count(params) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(p.size for p in jax.tree.leaves(params))
