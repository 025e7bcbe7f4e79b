"""Train state: everything that training carries from step to step."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mefn_jax import optim
from mefn_jax.model import split_constants
from mefn_jax.runtime.sharding import param_shardings


@flax.struct.dataclass
class TrainState:
    """State of training between two steps.

    Attributes:
        step: number of completed steps, int32.
        params: all parameters, trained and frozen.
        constants: what is stored and not trained, by part of the model (`Model`).
        opt_state: the optimizer's state of the trained parameters.
        ema: exponential moving average of the trained parameters; None if `train.ema_decay` is 0.

    A random key is not part of the state: each step derives its keys from the seed and the step number.
    """

    step: jax.Array
    params: dict
    constants: dict
    opt_state: optax.OptState
    ema: dict | None = None

    @property
    def variables(self) -> dict:
        """Returns the parameters and the constants, as `Model` takes them."""
        return self.params | {"constants": self.constants}


def create_state(init, seed, optimizer, lr_multipliers, mesh, with_ema: bool = False) -> TrainState:
    """Returns the initial state for the variables that `init(seed)` makes, sharded by the rules of
    `runtime/sharding.py`. Parameters whose learning-rate multiplier is 0 get no optimizer state. With `with_ema`, the
    moving average starts at the initial parameters. The seed is an argument of the compiled program."""

    def build_state(seed):
        params, constants = split_constants(init(seed))
        trained_params = optim.select_trainable(params, lr_multipliers)
        ema = trained_params if with_ema else None
        return TrainState(jnp.int32(0), params, constants, optimizer.init(trained_params), ema)

    return jax.jit(build_state, out_shardings=param_shardings(mesh, jax.eval_shape(build_state, seed)))(seed)


def ema_update(ema, trained_params, step, decay: float):
    """Returns the updated exponential moving average of the trained parameters (docs/method.md, Eq. 54). The decay is
    min(decay, (1 + step) / (10 + step)), so that the first parameters are soon forgotten."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, trained_params)


def ema_params(state: TrainState, lr_multipliers) -> dict:
    """Returns the variables of a model: the moving average of the trained parameters, the frozen ones and the constants
    as they are."""
    return optim.merge(state.ema, optim.select_frozen(state.params, lr_multipliers)) | {"constants": state.constants}


def num_params(params) -> int:
    """Returns the number of scalars in a tree of parameters."""
    return sum(p.size for p in jax.tree.leaves(params))
