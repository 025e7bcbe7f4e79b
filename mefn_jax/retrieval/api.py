"""A trained model in Python: `mefn_jax.load` returns a `Retriever`. B images or captions, D the joint space."""

import os
from pathlib import Path

import numpy as np

from mefn_jax.data import images as image_files
from mefn_jax.data.pipeline import pad_rows
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.captions import encode_captions
from mefn_jax.evaluation.evaluator import Evaluator, concatenate
from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.features import Features
from mefn_jax.reports import explanation
from mefn_jax.reports.explanation import Explanation
from mefn_jax.runtime.console import printable
from mefn_jax.runtime.sharding import round_up
from mefn_jax.runtime.storage import expand_home


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
        DataError naming an image that cannot be read, and if `images` is not a list, or an empty one.
        """
        hint = "give images, a list of paths or of the bytes of files"
        if self.config.image.arch == "regions":
            hint = "give images, a list of arrays of regions (N, C) that all have the same shape"
        images = _to_list(images, f"encode_images: {hint}")
        if self.config.image.arch == "regions":
            return self._encode_in_batches([self._check_regions(x, k) for k, x in enumerate(images)])
        resize = image_files.resize_from_config(self.config.image)
        files = [read_image(image, f"image {k}") for k, image in enumerate(images)]
        return self._encode_in_batches([image_files.decode(data, resize, name) for data, name in files])

    def encode_texts(self, captions: list[str]) -> Features:
        """Returns the Features of B captions, as NumPy arrays; `fragments (B, M, D)` are the words.

        Raises ConfigError for a caption without words, and DataError if `captions` is not a list of texts, or an empty
        one.
        """
        captions = _to_list(captions, "encode_texts: give a list of captions")
        for k, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise DataError(f"encode_texts: caption {k} is no text but {_describe(caption)}")
        return encode_captions(self.evaluator, self.params, captions, "encode_texts")

    def score(self, images: Features, texts: Features) -> np.ndarray:
        """Returns the scores of all pairs, float32 `(I, T)`, on the scale of cosines; higher is better.

        Raises DataError unless both are Features as `encode_images` and `encode_texts` return them.
        """
        for name, features in (("images", images), ("texts", texts)):
            if not _are_features(features):
                raise DataError(
                    f"score: {name} are {_describe(features)}; give what encode_{name} of this model returns"
                )
        if images.pooled.shape[1] != texts.pooled.shape[1] or images.fragments.shape[2] != texts.fragments.shape[2]:
            raise DataError("score: images and texts have other numbers of dimensions; encode both with this model")
        all_pairs = slice(0, len(images.mask)), slice(0, len(texts.mask))
        return self.evaluator.scores(self.params, images, texts)(*all_pairs)

    def explain(self, image: str | Path | bytes, caption: str) -> Explanation:
        """Returns the explanation of one pair, to be drawn by `draw_explanation` of `mefn_jax.reports.figures`.

        Raises ConfigError for a matcher that has no attention, and for precomputed regions, and DataError as
        `encode_images` and `encode_texts` do.
        """
        if self.config.image.arch == "regions":
            raise ConfigError(
                "explain: this model takes precomputed regions; python eval.py explain draws those of a split"
            )
        data, name = read_image(image, "the image")
        return explanation.explain_image(self.evaluator, self.params, data, name, caption, self.encode_texts([caption]))

    def _check_regions(self, regions, number: int) -> np.ndarray:
        """Returns the regions of an image as float32 `(N, C)`. Raises DataError for anything else."""
        width = self.config.image.regions.width
        try:
            array = np.asarray(regions, np.float32)
        except (TypeError, ValueError):
            array = None
        if array is None or array.ndim != 2 or array.shape[1] != width or not array.size:
            raise DataError(f"encode_images: image {number} is {_describe(regions)}; give regions float (N, {width})")
        if not np.isfinite(array).all():
            raise DataError(f"encode_images: image {number} has NaN or inf")
        return array

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
    """Loads a trained model from a run's directory, which may be gs://, or an exported one from its folder or from the
    Hugging Face hub, as a text OWNER/NAME; nothing else is needed.

    `step` is "best" (by rSum on val), "latest" or a number; `ema` takes the averaged parameters. Raises
    CheckpointError, and ConfigError for a `workdir` or a `step` that cannot be one.
    """
    if not isinstance(workdir, str | os.PathLike) or not str(workdir) or "\0" in str(workdir):
        raise ConfigError(f"load: workdir is {_describe(workdir)}; give the directory of a training run")
    expanded = expand_home(os.fspath(workdir))
    return Retriever(*TrainedRun(expanded if isinstance(workdir, str) else Path(expanded), step, ema).load())


def read_image(image: str | Path | bytes, name: str) -> tuple[bytes, str]:
    """Returns the bytes of an image and its name: the path of a file, or `name` for bytes. Raises DataError."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image), name
    if not isinstance(image, str | os.PathLike):
        raise DataError(f"{name} is {_describe(image)}; give a path, or the bytes of a file")
    try:
        return Path(image).read_bytes(), str(image)
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the name
        raise DataError(f"{printable(str(image))}: {getattr(e, 'strerror', None) or e}") from None


def _to_list(values, message: str) -> list:
    """Returns the items of a list or of another sequence. Raises DataError with `message` for anything else, and for
    none."""
    is_plain = isinstance(values, str | bytes | bytearray | os.PathLike | dict | None)
    try:
        items = [] if is_plain else list(values)
    except TypeError:  # not iterable, such as a number or an array without axes
        items = []
    if not items:
        raise DataError(f"{message}; found {_describe(values)}")
    return items


def _are_features(features) -> bool:
    """Returns whether a value is Features of an item or more, with arrays `(B, L, D)`, `(B, L)` and `(B, D)`."""
    if not isinstance(features, Features):
        return False
    fragments, mask, pooled = (getattr(x, "shape", ()) for x in (features.fragments, features.mask, features.pooled))
    return len(fragments) == 3 and len(pooled) == 2 and fragments[:2] == mask and pooled[:1] == mask[:1] != (0,)


def _describe(value) -> str:
    """Returns what a value is, for an error message."""
    if isinstance(value, Features):
        return "Features of other shapes"
    shape = f" {value.shape}" if isinstance(value, np.ndarray) else ""
    text = f" {printable(repr(value)[:40])}" if isinstance(value, str | int | float | os.PathLike) else ""
    return f"{type(value).__name__}{shape}{text}"
