"""A model as the tasks see it: it encodes images and captions, and scores pairs of them."""

import dataclasses

import numpy as np

from mefn_jax.data import statistics
from mefn_jax.data.from_config import fill_data_widths
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.evaluate import describe_captions
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.features import Features
from mefn_jax.runtime.console import print0
from mefn_jax.scoring.tiles import TiledScores


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model with its parameters."""

    evaluator: Evaluator
    params: dict

    @property
    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer of the model."""
        return self.evaluator.tokenizer

    def check_inputs(self, images: Split) -> None:
        """Raises ConfigError if the model takes other inputs than these images and captions of its own reading."""
        if self.evaluator.config.text.arch == "cached":
            raise ConfigError("text.arch=cached: this model takes cached text, not the captions of a benchmark")
        fill_data_widths(self.evaluator.config, images)

    def encode_images(self, images: Split) -> Features:
        """Returns the Features of images."""
        self.check_inputs(images)
        return self.evaluator.encode_images(self.params, images)

    def encode_captions(self, captions: list[str]) -> Features:
        """Returns the Features of captions."""
        return self.evaluator.encode_captions(self.params, captions)

    def scores(self, images: Features, captions: Features) -> TiledScores:
        """Returns the scores of all pairs, to be computed a tile at a time."""
        return self.evaluator.scores(self.params, images, captions)

    def describe_captions(self, captions: list[str], name: str) -> dict:
        """Returns how well the model can read captions: the digest of its tokenizer, and the percentages of wordpieces
        that it does not know, and of captions that it reads only in part. Prints them."""
        description = describe_captions(self.evaluator, captions, name)
        limit = self.evaluator.config.text.max_tokens
        lengths, _ = statistics.count_wordpieces(captions, self.tokenizer)
        percent = 100 * float(np.mean(lengths > limit))
        if percent:
            print0(f"warning: of {percent:.1f} % of the captions only the first {limit} wordpieces are read")
        return description | {"cut_captions": percent}
