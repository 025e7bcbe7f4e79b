"""A trained model in Python: `mefn_jax.load` returns a `Retriever`. B images or captions, D the joint space."""

from pathlib import Path

import numpy as np

from mefn_jax.data import images as image_files
from mefn_jax.data.pipeline import pad_rows
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.captions import encode_captions
from mefn_jax.evaluation.evaluator import Evaluator, concatenate
from mefn_jax.evaluation.evaluator import load_checkpoint as load_evaluator
from mefn_jax.features import Features
from mefn_jax.reports import explanation
from mefn_jax.reports.explanation import Explanation
from mefn_jax.runtime.sharding import round_up


class Retriever:
    """A trained model.

    Attributes:
        config: the configuration that it was trained with.
        step: the step of its checkpoint.
        evaluator, params: the compiled model and its parameters.
    """

    def __init__(self, evaluator: Evaluator, params, step: int):
        self.evaluator, self.params, self.step, self.config = evaluator, params, step, evaluator.config

    def encode_images(self, images: list[str | Path | bytes]) -> Features:
        """Returns the Features of B images, as NumPy arrays; `fragments (B, N, D)` are the regions.

        An image is a path or the bytes of a file; for a model of precomputed regions, an array float `(N, C)`. Raises
        DataError naming an image that cannot be read.
        """
        if self.config.image.arch == "regions":
            return self._encode_in_batches([np.asarray(x, np.float32) for x in images])
        resize = image_files.resize_from_config(self.config.image)
        files = [read_image(image, f"image {k}") for k, image in enumerate(images)]
        return self._encode_in_batches([image_files.decode(data, resize, name) for data, name in files])

    def encode_texts(self, captions: list[str]) -> Features:
        """Returns the Features of B captions, as NumPy arrays; `fragments (B, M, D)` are the words.

        Raises ConfigError for a caption without words, and DataError if `captions` is not a list, or an empty one.
        """
        if isinstance(captions, str) or not len(captions):
            raise DataError("encode_texts: give a list of captions")
        return encode_captions(self.evaluator, self.params, list(captions), "encode_texts")

    def score(self, images: Features, texts: Features) -> np.ndarray:
        """Returns the scores of all pairs, float32 `(I, T)`, on the scale of cosines; higher is better."""
        all_pairs = slice(0, len(images.mask)), slice(0, len(texts.mask))
        return self.evaluator.scores(self.params, images, texts)(*all_pairs)

    def explain(self, image: str | Path | bytes, caption: str) -> Explanation:
        """Returns the explanation of one pair, to be drawn by `draw_explanation` of `mefn_jax.reports.figures`.

        Raises ConfigError for a matcher that has no entropy map, and for precomputed regions.
        """
        if self.config.image.arch == "regions":
            raise ConfigError(
                "explain: this model takes precomputed regions; python eval.py explain draws those of a split"
            )
        data, name = read_image(image, "the image")
        return explanation.explain_image(self.evaluator, self.params, data, name, caption, self.encode_texts([caption]))

    def _encode_in_batches(self, arrays: list[np.ndarray]) -> Features:
        devices, size = self.evaluator.mesh.size, self.config.eval.batch_size
        size = round_up(min(size, max(1, len(arrays))), devices)
        if not arrays or len({x.shape for x in arrays}) > 1:
            raise DataError("encode_images: give images, or arrays of regions that all have the same shape")
        batches = [np.stack(arrays[k : k + size]) for k in range(0, len(arrays), size)]
        return concatenate(
            [self.evaluator.encode_pixels(self.params, pad_rows(batch, size), len(batch)) for batch in batches]
        )


def load(workdir: str | Path, step: str | int = "best", ema: bool = False) -> Retriever:
    """Loads a trained model from a run's directory, which may be gs://; nothing else is needed.

    `step` is "best" (by rSum on val), "latest" or a number; `ema` takes the averaged parameters. Raises
    CheckpointError.
    """
    return Retriever(*load_evaluator(workdir, str(step), ema))


def read_image(image: str | Path | bytes, name: str) -> tuple[bytes, str]:
    """Returns the bytes of an image and its name: the path of a file, or `name` for bytes. Raises DataError."""
    if isinstance(image, bytes):
        return image, name
    try:
        return Path(image).read_bytes(), str(image)
    except OSError as e:
        raise DataError(f"{image}: {e.strerror}") from None
