"""A trained model that answers the page: it is loaded and compiled once.

Every program gets arrays of one shape whatever is asked, so that no query compiles anything. Between its steps a query
calls `report(done, total)`, which also ends it if nobody waits any longer.
"""

import dataclasses
from pathlib import Path

import numpy as np

from mefn_jax.data import images as image_files
from mefn_jax.data.parsing import read_text
from mefn_jax.data.pipeline import pad_rows
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.captions import check_caption, has_words
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.evaluation.run import Gallery, TrainedRun
from mefn_jax.features import Features
from mefn_jax.reports import explanation
from mefn_jax.reports.explanation import Explanation
from mefn_jax.retrieval.index import load_model
from mefn_jax.retrieval.searcher import Searcher, ignore, rank_captions
from mefn_jax.serving.pictures import check_image, encode_jpeg
from mefn_jax.serving.searched_images import SearchedImages, encode_split, open_indexed_images

EXAMPLES = 3  # captions that the page offers to try


@dataclasses.dataclass(frozen=True)
class Answer:
    """Results of a query.

    Attributes:
        positions: int64 `(n,)`, of images or of lines, best first.
        scores: float32 `(n,)`.
        scored: how many items the matcher has scored; 0 if the score is the product of the embeddings.
        notes: what a user should know, such as that the caption was cut.
    """

    positions: np.ndarray
    scores: np.ndarray
    scored: int
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model with the images that it searches and the lines that it ranks for an image.

    Attributes:
        name: the directory of its run.
        step: the step of its checkpoint.
        evaluator, params: the compiled model and its parameters.
        images: what is searched.
        lines: captions that are ranked for an image; `texts` are their Features, None without any.
        searcher: finds images for captions.
    """

    name: str
    step: int
    evaluator: Evaluator
    params: dict
    images: SearchedImages
    lines: list[str]
    texts: Features | None
    searcher: Searcher

    def describe_explanations(self) -> str:
        """Returns what can be shown of a pair: "entropies", "attention" or "scores" alone."""
        model = self.evaluator.model
        return "entropies" if model.has_entropies else "attention" if model.has_attention else "scores"

    def search(self, caption: str, top_k: int, report) -> Answer:
        """Returns the images that match a caption best. Raises ConfigError for a caption without words, and
        TrainingError for scores that are not finite."""
        notes = check_caption(self.evaluator, caption, "the query")
        texts = self.evaluator.encode_captions(self.params, [caption])
        (found,) = self.searcher.search(texts, top_k, report)
        return Answer(found.positions, found.scores, found.num_scored, notes)

    def rank_lines(self, image: int | bytes, top_k: int, report) -> Answer:
        """Returns the lines that match an image best: one of those searched, by position, or the bytes of a file.
        Raises ConfigError without lines, and DataError for an image that cannot be read."""
        if self.texts is None:
            raise ConfigError("there are no captions to rank; start the server with --captions=FILE.txt")
        report(0, 1)
        image_features = self._encode_image(image)
        found = rank_captions(self.evaluator, self.params, image_features, self.texts, self.lines, top_k, report)
        return Answer(found.positions, found.scores, found.num_scored, [])

    def explain(self, image: int | bytes, caption: str, report) -> Explanation:
        """Returns the explanation of an image, as in `rank_lines`, with a caption. Raises ConfigError for a matcher
        without attention, and as `check_caption` does."""
        explanation.check_can_explain(self.evaluator)
        check_caption(self.evaluator, caption, "the query")
        report(0, 1)
        texts = self.evaluator.encode_captions(self.params, [caption])
        features = self._encode_image(image)
        terms = explanation.explain_features(self.evaluator, self.params, features, texts)
        boxes = explanation.find_region_boxes(self.evaluator, features.mask.shape[1])
        name = "the image that was sent" if isinstance(image, bytes) else self.images.index.names[image]
        photo = None
        if isinstance(image, bytes) or self.images.read:
            photo = explanation.display_photo(self.evaluator, self._read(image), name)
        terms = {key: value[0] for key, value in terms.items()}
        return explanation.build_explanation(self.evaluator, caption, name, photo, boxes, terms)

    def _read(self, image: int | bytes) -> bytes:
        if isinstance(image, bytes):
            return check_image(image, "the image that was sent")
        return check_image(self.images.read(image), self.images.index.names[image])

    def _encode_image(self, image: int | bytes) -> Features:
        """Returns the Features of one image."""
        if not isinstance(image, bytes) and self.images.index.fragments is not None:
            return self.images.index.features(np.array([image]))
        if self.evaluator.config.image.arch == "regions":
            raise ConfigError("this model takes precomputed regions, not images")
        resize = image_files.resize_from_config(self.evaluator.config.image)
        pixels = image_files.decode(self._read(image), resize, "that was sent")[None]
        return self.evaluator.encode_pixels(self.params, pad_rows(pixels, self.evaluator.mesh.size), 1)


def load_served_model(run: TrainedRun, index: str | None, gallery: Gallery, captions: str) -> ServedModel:
    """Loads a run and opens the index, or encodes the split of `gallery`. `captions` names a text file with a caption
    on each line; empty for captions of the split. Raises ConfigError, DataError and CheckpointError."""
    evaluator, params, checkpoint_id = load_model(run)
    if evaluator.config.text.arch == "cached":
        raise ConfigError(f"--workdir={run.workdir}: this model takes cached text, not captions that are typed")
    images = open_indexed_images(index, checkpoint_id) if index else encode_split(evaluator, params, gallery)
    own_lines = [caption for caption in images.captions if has_words(evaluator, caption)]
    lines = read_lines(captions, evaluator) if captions else own_lines
    texts = evaluator.encode_captions(params, lines) if lines else None
    searcher = Searcher(evaluator, params, images.index)
    return ServedModel(str(run.workdir), checkpoint_id["step"], evaluator, params, images, lines, texts, searcher)


def read_lines(path: str, evaluator: Evaluator) -> list[str]:
    """Returns the lines of a file of captions that have words. Raises DataError if there are none."""
    lines = [line for line in map(str.strip, read_text(Path(path)).split("\n")) if has_words(evaluator, line)]
    if not lines:
        raise DataError(f"--captions={path}: no line with a word in it")
    return lines


def warm_up(model: ServedModel) -> None:
    """Answers a query of each kind, so that all programs are compiled before the first user comes."""
    caption = model.lines[0] if model.lines else "a"
    position = int(model.images.index.readable.argmax())
    takes_images = model.evaluator.config.image.arch != "regions"
    image = encode_jpeg(np.zeros((64, 64, 3), np.uint8)) if takes_images else position
    if has_words(model.evaluator, caption):
        model.search(caption, 1, ignore)
        if model.describe_explanations() != "scores":
            model.explain(image, caption, ignore)
    if model.texts is not None:
        model.rank_lines(position, 1, ignore)
        model.rank_lines(image, 1, ignore)
