"""What training carries from step to step."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mefn_jax import optim
from mefn_jax.runtime.sharding import param_shardings


@flax.struct.dataclass
class TrainState:
    """`step` int32, the number of steps done; the parameters; the optimiser's state; the average of the parameters that
    are trained (`average`), None without one. No random key: it is folded from the seed and the step."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    ema: dict | None = None


def create_state(init, optimizer, factors, mesh, averaged: bool = False) -> TrainState:
    """A new state of the parameters that `init()` makes, laid out by the rules of `sharding.py`; the optimiser
    has no state for those whose learning rate has factor 0. With `averaged`, the parameters' average begins with them.
    """

    def new():
        params = init()
        trained = optim.trainable(params, factors)
        return TrainState(jnp.int32(0), params, optimizer.init(trained), trained if averaged else None)

    return jax.jit(new, out_shardings=param_shardings(mesh, jax.eval_shape(new)))()


def ema_update(ema, trained, step, decay: float):
    """The exponential moving average of the parameters after `step` steps, by `decay`, or by (1 + step) / (10 + step)
    while that is less, so that the beginning is soon forgotten."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, trained)


def ema_params(state: TrainState, factors) -> dict:
    """All parameters, the average of those that are trained."""
    return optim.merge(state.ema, optim.frozen(state.params, factors))


def num_params(params) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(p.size for p in jax.tree.leaves(params))
