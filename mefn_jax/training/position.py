"""Position of a run in its steps and in its data."""

import dataclasses
import math

from mefn_jax import config as configuration
from mefn_jax.config import count_pairs
from mefn_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Position:
    """Position of a run: `step` steps are completed, which have seen `examples` pairs. The batch size may change when a
    run resumes, so that neither follows from the other."""

    step: int = 0
    examples: int = 0

    def after(self, step: int, pairs: int) -> "Position":
        """Returns the position when `step` steps are completed, the further ones with this number of pairs."""
        return Position(step, self.examples + (step - self.step) * pairs)

    def data_offset(self, pairs: int) -> int:
        """Returns the position in the data at which step 0 would have begun if all steps had had this number of pairs;
        see `offset` of `pipeline.training_dataset`."""
        return self.examples - self.step * pairs

    def count_steps(self, config, captions: int) -> int:
        """Returns the number of steps of the whole run, the completed ones included, with `captions` pairs in an
        epoch. Raises ConfigError if there are too many."""
        train_config, size = config.train, count_pairs(config)
        if train_config.steps:
            return train_config.steps
        if train_config.epochs * captions / size > configuration.LARGEST_INT:
            raise ConfigError(f"train.epochs={train_config.epochs} are more than {configuration.LARGEST_INT} steps")
        return self.step + max(0, math.ceil(train_config.epochs * captions / size - self.examples / size))

    def schedule(self, config, captions: int) -> tuple[int, float]:
        """Returns the length of the learning rate's schedule in steps, and by how many steps it is ahead of the run. In
        a run of `train.epochs` epochs it follows the share of the examples that were seen."""
        if config.train.steps:
            return config.train.steps, 0.0
        whole, pairs = Position().count_steps(config, captions), count_pairs(config)
        return whole, self.data_offset(pairs) / pairs
