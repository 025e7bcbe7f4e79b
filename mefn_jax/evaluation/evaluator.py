"""A model compiled for evaluation: encodes a split, scores all pairs; from a training run or from its checkpoint."""

import dataclasses
import functools

import jax
import ml_collections
import numpy as np

from mefn_jax import metrics, optim
from mefn_jax.data import pipeline
from mefn_jax.data.from_config import make_tokenizer
from mefn_jax.data.images import resize_from_config
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.encoders.pretrained import towers
from mefn_jax.errors import CheckpointError, ConfigError
from mefn_jax.features import Features
from mefn_jax.model import Model, build_model, dummy_inputs
from mefn_jax.resolve import check_options
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.runtime.sharding import (
    batch_sharding,
    from_full_copy,
    from_local_rows,
    local_rows,
    make_mesh,
    replicated,
    round_up,
)
from mefn_jax.scoring import rerank, tiles
from mefn_jax.scoring.ranking import rank
from mefn_jax.scoring.tiles import TILE_CAPTIONS, TiledScores, even_slices


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A model's compiled encoders and matcher on a mesh, made once and used for every evaluation of a run."""

    model: Model
    tokenizer: Tokenizer
    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def _compiled(self):
        everywhere, rows = replicated(self.mesh), batch_sharding(self.mesh)
        return (
            jax.jit(self.model.encode_images, in_shardings=(None, rows), out_shardings=everywhere),
            jax.jit(self.model.encode_texts, in_shardings=(None, rows, rows), out_shardings=everywhere),
            compile_scorer(self.model, self.mesh, score_tile_mib(self.config, self.mesh)),
            jax.jit(self.model.embed),
            jax.jit(jax.vmap(self.model.explain, (None, 0, 0)), out_shardings=everywhere),
            jax.jit(self.model.hub_offsets),
        )

    @functools.cached_property
    def _lists(self):
        return rerank.compile_reranker(self.model.score_tile, self.mesh)

    def rerank(self, params, images: Features, texts: Features, k: int) -> rerank.Candidates:
        """The scores of each caption with k images, near ones (see `shortlist.py`)."""
        coarse = [self.embed(params, features) for features in (images, texts)]
        mib = score_tile_mib(self.config, self.mesh)
        levels = self._compiled[5](params, images, texts)  # not `levels`, which would wait for it
        found = rerank.score_candidates(self._lists, params, images, texts, *coarse, k, self.mesh, mib)
        of_images, of_texts = map(np.asarray, levels)
        return dataclasses.replace(found, scores=found.scores - of_images[found.images] - of_texts[:, None])

    def encode(self, params, split: Split) -> tuple[Features, Features]:
        """Features of all images and all captions of a split, as NumPy arrays in source order."""
        encode_images = self._compiled[0]
        c = self.config
        size = round_up(c.eval.batch_size, self.mesh.size)
        image_parts = [
            _to_host(encode_images(params, from_local_rows(self.mesh, images)), number)
            for images, number in pipeline.image_batches(
                split, resize_from_config(c.image), size, c.data.threads, rows=local_rows(self.mesh, size)
            )
        ]
        return concatenate(image_parts), self._texts(params, pipeline.caption_batches(split, self.tokenizer, size))

    def _texts(self, params, batches) -> Features:
        encode = self._compiled[1]
        return concatenate(
            [
                _to_host(encode(params, *from_full_copy(batch_sharding(self.mesh), texts)), number)
                for *texts, number in batches
            ]
        )

    def encode_pixels(self, params, pixels: np.ndarray, number: int) -> Features:
        """Features of the first `number` of a batch of images that every process has; its size is a multiple of the
        devices."""
        return _to_host(self._compiled[0](params, from_full_copy(batch_sharding(self.mesh), pixels)), number)

    def encode_captions(self, params, captions: list[str]) -> Features:
        """Features of captions."""
        size = round_up(min(len(captions), self.config.eval.batch_size), self.mesh.size)
        return self._texts(params, pipeline.text_batches(captions, self.tokenizer, size))

    def embed(self, params, features: Features) -> np.ndarray:
        """The vectors for shortlists, float32 `(B, D)`."""
        some = [
            jax.tree.map(lambda x, rows=rows: x[rows], features)
            for rows in even_slices(len(features.mask), TILE_CAPTIONS)
        ]
        return np.concatenate([np.asarray(self._compiled[3](params, x)) for x in some])

    def explain(self, params, images: Features, texts: Features) -> dict:
        """`Model.explain` of pairs, image k and text k: arrays `(B, ...)`."""
        return self._compiled[4](params, *from_full_copy(replicated(self.mesh), (images, texts)))

    def scores(self, params, images: Features, texts: Features) -> TiledScores:
        """All pairs' scores of encoded images and captions, a tile at a time."""
        step = functools.partial(self._compiled[2], params)
        if not self.model.has_tile:
            return TiledScores(step, images, texts, self.mesh, plain=True)
        return TiledScores(step, images, texts, self.mesh, hub_offsets=self.hub_offsets(params, images, texts))

    def hub_offsets(self, params, images: Features, texts: Features) -> tuple[np.ndarray, np.ndarray]:
        """What is taken from the matcher's tiles of each image, float32 `(I,)`, and of each caption, `(C,)`."""
        return tuple(np.asarray(x) for x in self._compiled[5](params, images, texts))

    def evaluate(self, params, images: Features, texts: Features, split: Split) -> dict:
        """`metrics.summarise` of an encoded split: what training looks at."""
        found = rank(self.scores(params, images, texts), split.caption_image)
        return metrics.retrieval_metrics(*found.counts[1], split.caption_image)


def compile_scorer(model: Model, mesh, mib: float):
    """The compiled program that scores a tile: `tiled.compiled` of the matcher's `tile`; of a matcher without one,
    `step(params, images, texts)` of Features."""
    if model.has_tile:
        return tiles.compile_tile_scorer(model.score_tile, mesh, mib)
    everywhere = replicated(mesh)
    return jax.jit(model.score, in_shardings=(None, batch_sharding(mesh), everywhere), out_shardings=everywhere)


def score_tile_mib(config, mesh) -> float:
    """`eval.score_tile_mib`, or what is fast on these devices."""
    return config.eval.score_tile_mib or default_score_tile_mib(mesh)


def default_score_tile_mib(mesh) -> float:
    """What is fast: in a processor's cache, or enough to keep an accelerator busy."""
    return 1.0 if mesh.devices.flat[0].platform == "cpu" else 8.0


def _to_host(features: Features, number: int) -> Features:
    return jax.tree.map(lambda x: np.asarray(x)[:number], features)


def concatenate(parts: list[Features]) -> Features:
    """Features one after the other."""
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def load_checkpoint(workdir, step: str, ema: bool = False):
    """A trained model: `(Evaluator, params, step)` from a workdir's checkpoint ("best", "latest" or a number); with
    `ema`, the average of its parameters.

    Needs nothing but the checkpoint. Raises CheckpointError if there is none, it cannot be read, is of an
    earlier version or has no average.
    """
    mesh = make_mesh()
    with Checkpoints(workdir) as checkpoints:
        number = checkpoints.resolve_step(step)
        meta = checkpoints.meta(number)
        config = ml_collections.ConfigDict(meta["config"])
        if "score_tile_mib" not in config.eval:
            raise CheckpointError(
                f"{workdir}: is of an earlier version (commit {meta['commit']}), whose configuration has no "
                "eval.score_tile_mib; evaluate it there, or train anew"
            )
        tokenizer = make_tokenizer(config, meta["tokenizer"])
        model = build_model(config, tokenizer.vocab_size)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *dummy_inputs(config))
        where = replicated(mesh)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)
        if ema and not config.train.get("ema_decay"):
            raise CheckpointError(f"{workdir}: was trained without an average of its parameters (train.ema_decay)")
        factors = optim.lr_multipliers(shapes, config.train.lr_multipliers, config.train.layer_decay)
        trained = {"ema": optim.trainable(abstract, factors)} if ema else {}
        found = checkpoints.restore(number, {"params": abstract} | trained)
    params = optim.merge(found["ema"], found["params"]) if ema else found["params"]
    return Evaluator(model, tokenizer, config, mesh), params, number


def load_zero_shot(config: ml_collections.ConfigDict):
    """Pretrained towers scored by what they bring themselves, `model=clip`: `(Evaluator, params)`.

    Raises ConfigError where something would be random: another model, or a tower that is not CLIP's.
    """
    check_options(config)
    if config.model != "clip":
        raise ConfigError(
            f"model={config.model} has to be trained; without training there is --config=FILE.py:model=clip"
        )
    if (config.image.pooling, config.text.pooling) != ("tower", "tower"):
        raise ConfigError("image.pooling and text.pooling must be tower: the others pool what is not trained")
    config, found, json = towers.load_pretrained(config)
    lacking = [kind for kind in ("image", "text") if kind not in found or found[kind].projection is None]
    if lacking:
        raise ConfigError(
            f"{lacking[0]}.pretrained={config[lacking[0]].pretrained!r}: give a CLIP checkpoint with its projection; "
            "any other tower has to be trained first"
        )
    mesh, tokenizer = make_mesh(), make_tokenizer(config, json)
    towers.check_vocabulary(config, tokenizer.vocab_size)
    model = build_model(config, tokenizer.vocab_size)
    params = towers.insert_pretrained(model.init(jax.random.key(0), *dummy_inputs(config)), found)
    return Evaluator(model, tokenizer, config, mesh), jax.device_put(params, replicated(mesh))
