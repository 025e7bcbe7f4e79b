"""Mines hard negatives of every training caption, for a training to put them into one batch (docs/training.md).

    python eval.py mine --workdir=DIR --out=FILE.safetensors [--k=10] [--candidates=100]
    python train.py --config=FILE.py --config.data.negatives=FILE.safetensors ...

The images nearest to each caption by embedding are candidates, and the matcher scores these, as in reranking. Of the
best other images, each gives one negative: its caption that scores highest with the first caption's image. Two captions
are never negatives of each other if they have the same image, or if one is also a caption of the other's image.
The file depends on the checkpoint and the split alone. C captions, K negatives.
"""

import itertools
import time

import jax
import numpy as np
from absl import flags

from mefn_jax.data.digests import digest_split
from mefn_jax.data.mixture import MixedSplit
from mefn_jax.data.negatives import HardNegatives, is_negatives, number_texts, write_negatives
from mefn_jax.data.pipeline import digest_captions
from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError, DataError, TrainingError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.evaluation.gallery import open_split
from mefn_jax.evaluation.run import Gallery, TrainedRun, define_run_flags, run_from_flags
from mefn_jax.runtime.cli import define_count_flag, define_path_flag, define_process_flags
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.multihost import initialize
from mefn_jax.runtime.outputs import check_output_file
from mefn_jax.runtime.provenance import params_digest
from mefn_jax.scoring.rerank import Candidates

CAPTIONS_AT_ONCE = 16_384  # captions that are encoded and scored at once, which bounds the memory


def mine_negatives(run: TrainedRun, out: str, k: int = 10, candidates: int = 100, data_dir: str = "") -> HardNegatives:
    """Mines k hard negatives of each caption of the split that a run was trained on, prints how hard they are, and
    writes them into the file `out`.

    `candidates`: images that the matcher scores for each caption. `data_dir`: where the data set lies, if it has moved.
    Raises ConfigError for a matcher that cannot rerank and for a run on a mixture, DataError for data on which the run
    was not trained.
    """
    path = check_output_file("--out", out, (".safetensors",), is_negatives)
    evaluator, params, step = run.load()
    if jax.process_count() > 1:
        raise ConfigError("negatives are mined by one process, which may use several devices: run it on one machine")
    if not evaluator.model.has_tile:
        raise ConfigError(
            f"--workdir={run.workdir}: the matcher of model={evaluator.config.model} has neither score_products nor "
            "score_tile, by which candidates are scored; mine with a run of another model"
        )
    opened, start = open_split(evaluator, Gallery(data_dir, "train")), time.perf_counter()
    if not opened.is_own:
        raise DataError(f"--data_dir={data_dir}: is not the data that the run was trained on; leave it out")
    split = opened.split
    if isinstance(split, MixedSplit):
        raise ConfigError(
            f"--workdir={run.workdir}: was trained on a mixture, with which data.negatives does not go; mine with a "
            "run on one data set"
        )
    if split.num_images < 2:
        raise DataError(f"{opened.dataset.directory}: train has one image, and so no negatives")
    texts = number_texts(digest_captions(split.all_captions()))
    found = score_captions(evaluator, params, split, min(candidates, split.num_images))
    negatives, scores = choose_negatives(found, split.caption_image, texts, k)
    made_by = {"split": digest_split(split), "parameters": params_digest(params), "step": step}
    write_negatives(path, negatives, scores, made_by | {"k": k, "candidates": candidates})
    print_hardness(found, negatives, scores)
    print0(f"wrote {out} in {time.perf_counter() - start:.0f} s; train with --config.data.negatives={out}")
    return negatives


def score_captions(evaluator: Evaluator, params, split: Split, candidates: int) -> Candidates:
    """Returns the candidates of each caption of a split, with the matcher's scores (`Evaluator.rerank`); a part of the
    captions at a time. Raises TrainingError if a score is not finite."""
    images, found = evaluator.encode_images(params, split), []
    ends = np.searchsorted(split.caption_offsets, np.arange(0, split.num_captions, CAPTIONS_AT_ONCE), "left")
    bounds = np.unique([*ends, split.num_images])
    for first, last in itertools.pairwise(bounds):
        part = split.take(split.name, int(first), int(last))
        found.append(evaluator.rerank(params, images, evaluator.encode_texts(params, part), candidates))
        _check_scores(found[-1].scores, int(split.caption_offsets[first]))
    return Candidates(*(np.concatenate([getattr(x, name) for x in found]) for name in ("images", "scores")))


def _check_scores(scores: np.ndarray, first: int) -> None:
    """Raises TrainingError, naming the first caption, if a score of captions from `first` on is not finite."""
    if not (is_finite := np.isfinite(scores).all(1)).all():
        raise TrainingError(
            f"the score of caption {first + int(np.argmin(is_finite))} with a candidate is not finite; the parameters "
            "or features are not finite"
        )


def choose_negatives(found: Candidates, caption_image, texts, k: int) -> tuple[HardNegatives, np.ndarray]:
    """Returns k hard negatives of each caption, with the scores float32 `(C, K)` of the caption with their images, from
    the candidates of all captions. The first of equal images and captions is taken."""
    order = np.argsort(found.images, 1, kind="stable")
    order = np.take_along_axis(order, np.argsort(-np.take_along_axis(found.scores, order, 1), 1, kind="stable"), 1)
    images, scores = (np.take_along_axis(x, order, 1) for x in (found.images, found.scores))
    number, caption_image = len(texts), np.asarray(caption_image)
    negatives = HardNegatives(np.full((number, k), -1, np.int32), texts, caption_image)
    chosen_scores, count = np.full((number, k), -np.inf, np.float32), np.zeros(number, int)
    lookup = _ScoreLookup(found)
    for column in range(images.shape[1]):
        rows = np.flatnonzero(count < k)
        if not len(rows):
            break
        captions = _choose_captions(negatives, lookup, rows, images[rows, column])
        rows, captions = rows[captions >= 0], captions[captions >= 0]
        negatives.captions[rows, count[rows]] = captions
        chosen_scores[rows, count[rows]] = scores[rows, column]
        count[rows] += 1
    return negatives, chosen_scores


class _ScoreLookup:
    """The scores of candidates by caption and image."""

    def __init__(self, found: Candidates):
        self._stride = int(found.images.max()) + 1
        keys = (np.arange(len(found.images))[:, None] * self._stride + found.images).reshape(-1)
        order = np.argsort(keys)
        self._keys, self._scores = keys[order], found.scores.reshape(-1)[order]

    def __call__(self, captions: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Returns the scores of captions with images, float32; -inf where an image is no candidate of the caption."""
        wanted = captions.astype(np.int64) * self._stride + images
        found = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        is_known = (self._keys[found] == wanted) & (images < self._stride)
        return np.where(is_known, self._scores[found], -np.inf).astype(np.float32)


def _choose_captions(negatives: HardNegatives, lookup: _ScoreLookup, rows: np.ndarray, images: np.ndarray):
    """Returns, for each caption of `rows` and its image in `images`, the negative among the captions of that image that
    scores highest with the caption's own image, int64; -1 where there is none."""
    first = np.searchsorted(negatives.caption_image, images, "left")
    last = np.searchsorted(negatives.caption_image, images, "right")
    best, chosen = np.full(len(rows), -np.inf, np.float32), np.full(len(rows), -1)
    for number in range(int(np.max(last - first, initial=0))):
        captions = np.minimum(first + number, last - 1)
        may_be = (first + number < last) & negatives.is_negative(rows, captions)
        scores = lookup(captions, negatives.caption_image[rows])
        takes = may_be & ((chosen < 0) | (scores > best))
        best, chosen = np.where(takes, scores, best), np.where(takes, captions, chosen)
    return chosen


def print_hardness(found: Candidates, negatives: HardNegatives, scores: np.ndarray) -> None:
    """Prints how many negatives were found, and how often one scores higher than the caption's own image."""
    is_own = found.images == negatives.caption_image[:, None]
    own = np.max(np.where(is_own, found.scores, -np.inf), 1)
    number, k = negatives.captions.shape
    print0(
        f"mined {np.sum(negatives.captions >= 0):,} hard negatives of {number:,} captions, at most {k} each; "
        f"{np.sum(negatives.captions[:, 0] < 0):,} captions have none\n"
        f"{100 * np.mean(scores[:, 0] >= own):.1f} % of the captions score no lower with the image of their hardest "
        "negative than with their own"
    )


def define_flags() -> None:
    """Defines the flags of the command."""
    define_run_flags()
    define_path_flag("out", None, "A .safetensors file for the negatives.", required=True)
    define_count_flag("k", 10, "Number of negatives of each caption.")
    define_count_flag("candidates", 100, "Number of images that the matcher scores for each caption.")
    define_path_flag("data_dir", "", "Where the data set of the run lies, if it has moved.")
    define_process_flags()


def main() -> None:
    """Runs the command."""
    f = flags.FLAGS
    initialize()
    mine_negatives(run_from_flags(), f.out, f.k, f.candidates, f.data_dir)
