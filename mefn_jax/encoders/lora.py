"""LoRA (Hu et al. 2022): a frozen matrix of a tower is trained by the product of two thin ones that is added to it."""

import dataclasses
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np

from mefn_jax.errors import ConfigError

TOWERS = ("image", "text")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Adapters of the towers' matrices: kernel `W (in, out)` becomes `W + alpha / rank * down @ up`.

    `down (in, rank)` is random and `up (rank, out)` zero at first, so that a tower begins as it was. Adapters are a
    part of a model's parameters by the path of the layer, `lora/image/backbone/layer_0/attention/query/{down,up}`.

    Attributes:
        rank: columns of `down`.
        alpha: scale of the product; divided by the rank, so that a change of rank needs no other learning rate.
        matrices: regular expression that is searched in the path of each two-dimensional kernel of the towers.
    """

    rank: int
    alpha: float
    matrices: str

    def init(self, key: jax.Array, params: dict) -> dict:
        """Returns random adapters of the towers in `params`, by tower. Raises ConfigError if no matrix is named."""
        adapters = {}
        for path, kernel in self._find(params):
            bound = 1 / np.sqrt(kernel.shape[0])
            down_key = jax.random.fold_in(key, len(adapters))
            shape = (kernel.shape[0], self.rank)
            adapters[*path[:-1], "down"] = jax.random.uniform(down_key, shape, minval=-bound, maxval=bound)
            adapters[*path[:-1], "up"] = jnp.zeros((self.rank, kernel.shape[1]))
        if not adapters:
            raise ConfigError(
                f"train.lora.matrices: {self.matrices!r} is found in no matrix of a tower; paths look like "
                "image/backbone/layer_0/attention/query/kernel"
            )
        return flax.traverse_util.unflatten_dict(adapters)

    def merge(self, variables: dict, parts=TOWERS) -> dict:
        """Returns a model's variables without adapters: those of the towers `parts` are added to the matrices. Without
        adapters, the variables as they are."""
        if "lora" not in variables:
            return variables
        merged = {name: part for name, part in variables.items() if name != "lora"}
        for tower in set(parts) & set(variables["lora"]):
            kernels = flax.traverse_util.flatten_dict(variables[tower])
            adapters = flax.traverse_util.flatten_dict(variables["lora"][tower])
            for path in [path[:-1] for path in adapters if path[-1] == "up"]:
                product = adapters[*path, "down"] @ adapters[*path, "up"]
                kernels[*path, "kernel"] = kernels[*path, "kernel"] + self.alpha / self.rank * product
            merged[tower] = flax.traverse_util.unflatten_dict(kernels)
        return merged

    def _find(self, params: dict) -> list[tuple[tuple, jax.Array]]:
        """Returns path and kernel of the matrices that get an adapter."""
        regex = compile_matrices(self.matrices)
        towers = {name: {"backbone": params[name].get("backbone", {})} for name in TOWERS}
        return [
            (path, kernel)
            for path, kernel in sorted(flax.traverse_util.flatten_dict(towers).items(), key=lambda item: item[0])
            if path[-1] == "kernel" and kernel.ndim == 2 and regex.search("/".join(path))
        ]


def compile_matrices(text: str) -> re.Pattern:
    """Returns the regular expression of `train.lora.matrices`. Raises ConfigError if it is malformed."""
    try:
        return re.compile(text)
    except re.error as e:
        raise ConfigError(f"train.lora.matrices: {text!r} is no regular expression ({e})") from None


def lora_from_config(config) -> LoRA | None:
    """Returns the LoRA of a configuration; None if `train.lora.rank` is 0."""
    c = config.train.lora
    return LoRA(c.rank, c.alpha, c.matrices) if c.rank else None
