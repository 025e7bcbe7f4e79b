"""A model compiled for evaluation: encodes a split and scores pairs.

Training makes one of its run; `load_checkpoint` and `load_zero_shot` make one of a checkpoint and of pretrained CLIP.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from mefn_jax import metrics, optim
from mefn_jax.config import JOINT_SYSTEMS
from mefn_jax.data import pipeline
from mefn_jax.data.from_config import make_tokenizer
from mefn_jax.data.images import resize_from_config
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.encoders.inputs import dummy_inputs
from mefn_jax.encoders.pretrained import towers
from mefn_jax.errors import CheckpointError, ConfigError
from mefn_jax.features import Features
from mefn_jax.model import Model, build_model, split_constants
from mefn_jax.resolve import check_options, resolve
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
from mefn_jax.scoring import certificate, rerank, tiles
from mefn_jax.scoring.ranking import Ranking, rank
from mefn_jax.scoring.tiles import PAIRS_BLOCK, TILE_CAPTIONS, UNTILED_BLOCK, TiledScores, even_slices


class Programs(NamedTuple):
    """The compiled functions of an `Evaluator`: those of `Model` by name; `score` is that of `compile_scorer`."""

    encode_images: Callable
    encode_texts: Callable
    score: Callable
    embed: Callable
    image_vectors: Callable
    text_vectors: Callable
    hub_offsets: Callable
    prepare: tuple[Callable, Callable]
    score_list: Callable
    attention: Callable
    explain: Callable


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A model compiled for evaluation: its encoders and its matcher on a mesh.

    It is made once and used for every evaluation of a run, so that nothing is compiled twice. `data` are the digests of
    the data that it was trained on (`digests.digest_data`), None if they are not known.
    """

    model: Model
    tokenizer: Tokenizer
    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    data: dict | None = None

    @functools.cached_property
    def _programs(self) -> Programs:
        """Returns the compiled functions. Each compiles when it is first called."""
        model, everywhere, rows = self.model, replicated(self.mesh), batch_sharding(self.mesh)
        return Programs(
            encode_images=jax.jit(model.encode_images, in_shardings=(None, rows), out_shardings=everywhere),
            encode_texts=jax.jit(model.encode_texts, in_shardings=(None, rows, rows), out_shardings=everywhere),
            score=compile_scorer(model, self.mesh, score_tile_mib(self.config, self.mesh)),
            embed=jax.jit(model.embed),
            image_vectors=jax.jit(model.image_vectors),
            text_vectors=jax.jit(model.text_vectors),
            hub_offsets=jax.jit(model.hub_offsets),
            prepare=tuple(jax.jit(function, out_shardings=everywhere) for function in model.prepare),
            score_list=certificate.compile_list_scorer(model.score_pairs, self.mesh),
            attention=jax.jit(jax.vmap(model.attention, (None, 0, 0))),
            explain=jax.jit(jax.vmap(model.explain, (None, 0, 0)), out_shardings=everywhere),
        )

    @functools.cached_property
    def _reranker(self):
        model = self.model
        with_pooled = model.matcher.uses_pooled_products
        return rerank.compile_reranker(model.score_tile, with_pooled, self.mesh, model.projections)

    def rerank(self, params, images: Features, texts: Features, k: int) -> rerank.Candidates:
        """Returns k candidates for each caption, with the matcher's scores (docs/method.md, Eqs. 35, 64, 65)."""
        vectors = self.image_vectors(params, images), self.text_vectors(params, texts)
        mib = score_tile_mib(self.config, self.mesh)
        # Not `self.hub_offsets`, which would wait for the result.
        offsets = self._programs.hub_offsets(params, images, texts)
        candidates = rerank.score_candidates(self._reranker, params, images, texts, *vectors, k, self.mesh, mib)
        image_offsets, text_offsets = map(np.asarray, offsets)
        scores = candidates.scores - image_offsets[candidates.images] - text_offsets[:, None]
        return dataclasses.replace(candidates, scores=scores)

    def rank_first(
        self, params, images: Features, texts: Features, caption_image: np.ndarray, k: int
    ) -> tuple[Ranking, tuple[float, float]] | None:
        """Ranks only as many pairs as make sure that the first k results of every query are those of all pairs; for a
        model with `has_bound`. Returns the Ranking (`certificate.rank_first_results`) and the shares of all pairs that
        were scored (`FirstResults`); None if more than half of the pairs would be needed."""
        start = time.perf_counter()
        vectors = self.image_vectors(params, images), self.text_vectors(params, texts)
        offsets = self.hub_offsets(params, images, texts)

        def centers(rows, columns):
            return vectors[0][rows] @ vectors[1][columns].T - offsets[1][columns]

        first = certificate.find_first_results(
            centers,
            self.model.score_bound()[1],
            self.listed_scores(params, images, texts, offsets),
            *map(len, vectors),
            k,
        )
        if first is None:
            return None
        ranking = certificate.rank_first_results(first, caption_image)
        return dataclasses.replace(ranking, seconds=time.perf_counter() - start), first.shares

    def listed_scores(self, params, images: Features, texts: Features, hub_offsets) -> certificate.ListedScores:
        """Returns the scores of pairs of encoded images and captions, to be computed for lists of pairs; for a model
        with `has_pairs`."""
        items = from_full_copy(replicated(self.mesh), (images, texts))
        prepared = [program(params, x) for program, x in zip(self._programs.prepare, items, strict=True)]
        mib, scorer = score_tile_mib(self.config, self.mesh), functools.partial(self._programs.score_list, params)
        max_pairs = tiles.count_pairs_at_once(self.model.floats_per_pair(images, texts), mib)
        return certificate.ListedScores(scorer, *prepared, self.mesh, hub_offsets, max_pairs)

    def encode(self, params, split: Split) -> tuple[Features, Features]:
        """Returns the Features of all images and of all captions of a split, as NumPy arrays in source order."""
        return self.encode_images(params, split), self.encode_texts(params, split)

    def encode_images(self, params, split: Split) -> Features:
        """Returns the Features of all images of a split, as NumPy arrays in source order."""
        encode_images = self._programs.encode_images
        c = self.config
        size = round_up(c.eval.batch_size, self.mesh.size)
        batches = pipeline.image_batches(
            split, resize_from_config(c.image), size, c.data.threads, rows=local_rows(self.mesh, size)
        )
        return concatenate(
            [_to_host(encode_images(params, from_local_rows(self.mesh, images)), number) for images, number in batches]
        )

    def encode_texts(self, params, split: Split) -> Features:
        """Returns the Features of all captions of a split, as NumPy arrays in source order."""
        size = round_up(self.config.eval.batch_size, self.mesh.size)
        return self._encode_text_batches(params, pipeline.caption_batches(split, self.tokenizer, size))

    def _encode_text_batches(self, params, batches) -> Features:
        encode_texts = self._programs.encode_texts
        return concatenate(
            [
                _to_host(encode_texts(params, *from_full_copy(batch_sharding(self.mesh), texts)), number)
                for *texts, number in batches
            ]
        )

    def encode_pixels(self, params, pixels: np.ndarray, number: int) -> Features:
        """Returns the Features of the first `number` images of a batch that every process has.

        The size of the batch must be a multiple of the number of devices.
        """
        return _to_host(self._programs.encode_images(params, from_full_copy(batch_sharding(self.mesh), pixels)), number)

    def encode_captions(self, params, captions: list[str]) -> Features:
        """Returns the Features of captions."""
        size = round_up(min(len(captions), self.config.eval.batch_size), self.mesh.size)
        return self._encode_text_batches(params, pipeline.text_batches(captions, self.tokenizer, size))

    def embed(self, params, features: Features) -> np.ndarray:
        """Returns one vector for each item, float32 `(B, D)` (`Model.embed`)."""
        return self._map_slices(self._programs.embed, params, features)

    def image_vectors(self, params, images: Features) -> np.ndarray:
        """Returns the vectors of images that choose candidates, float32 `(I, D)` (`Model.image_vectors`)."""
        return self._map_slices(self._programs.image_vectors, params, images)

    def text_vectors(self, params, texts: Features) -> np.ndarray:
        """Returns the vectors of texts that choose candidates, float32 `(T, D)` (`Model.text_vectors`)."""
        return self._map_slices(self._programs.text_vectors, params, texts)

    def _map_slices(self, program, params, features: Features) -> np.ndarray:
        """Returns the results of a program on slices of at most TILE_CAPTIONS items, as one array."""
        slices = [
            jax.tree.map(lambda x, rows=rows: x[rows], features)
            for rows in even_slices(len(features.mask), TILE_CAPTIONS)
        ]
        return np.concatenate([np.asarray(program(params, x)) for x in slices])

    def attention(self, params, images: Features, texts: Features) -> jax.Array:
        """Returns the attention of words over regions, image k with text k, float32 `(B, N, M)` (`Model.attention`)."""
        return self._programs.attention(params, images, texts)

    def explain(self, params, images: Features, texts: Features) -> dict:
        """Returns the terms of pairs (see `Model.explain`), image k with text k, as arrays `(B, ...)`."""
        return self._programs.explain(params, *from_full_copy(replicated(self.mesh), (images, texts)))

    def scores(self, params, images: Features, texts: Features) -> TiledScores:
        """Returns the scores of all pairs of encoded images and captions, to be computed a tile at a time."""
        score = functools.partial(self._programs.score, params)
        offsets = self.hub_offsets(params, images, texts)
        block = None if self.model.has_tile else PAIRS_BLOCK if self.model.has_pairs else UNTILED_BLOCK
        return TiledScores(score, images, texts, self.mesh, block, hub_offsets=offsets)

    def hub_offsets(self, params, images: Features, texts: Features) -> tuple[np.ndarray, np.ndarray]:
        """Returns the hubness offsets of images, float32 `(I,)`, and of captions, `(C,)` (docs/method.md, Eq. 34).

        They are subtracted from all scores of an image and of a caption, and are 0 without a hubness correction.
        """
        return tuple(np.asarray(x) for x in self._programs.hub_offsets(params, images, texts))

    def evaluate(self, params, images: Features, texts: Features, split: Split) -> dict:
        """Returns the `metrics.retrieval_metrics` of an encoded split, as training logs them. With a bound of the
        scores, only pairs that can count for recall are scored, and metrics of whole rankings are left out."""
        if self.model.has_bound:
            first = self.rank_first(params, images, texts, split.caption_image, max(metrics.RECALLS))
            if first is not None:
                return metrics.keep_recalls(metrics.retrieval_metrics(*first[0].counts[1], split.caption_image))
        ranking = rank(self.scores(params, images, texts), split.caption_image)
        return metrics.retrieval_metrics(*ranking.counts[1], split.caption_image)


def compile_scorer(model: Model, mesh, mib: float):
    """Returns the compiled program that scores a tile.

    It is `tiles.compile_tile_scorer` of the matcher's `score_tile`; for a matcher without one, it is
    `score(params, images, texts)` of Features, with `score_pairs` that of `tiles.compile_pair_scorer`. `mib`: the
    largest regions x words array on a device, in MiB.
    """
    if model.has_tile:
        with_pooled = model.matcher.uses_pooled_products
        return tiles.compile_tile_scorer(model.score_tile, with_pooled, mesh, mib, model.projections)
    if model.has_pairs:
        return tiles.compile_pair_scorer(model.prepare, model.score_pairs, model.floats_per_pair, mesh, mib)
    everywhere = replicated(mesh)
    return jax.jit(model.score, in_shardings=(None, batch_sharding(mesh), everywhere), out_shardings=everywhere)


def score_tile_mib(config, mesh) -> float:
    """Returns `eval.score_tile_mib`, or the default of these devices if it is 0 (docs/method.md, Eq. 50)."""
    return config.eval.score_tile_mib or default_score_tile_mib(mesh)


def default_score_tile_mib(mesh) -> float:
    """Returns a fast size of a score tile in MiB: it fits a CPU's cache, or keeps an accelerator busy."""
    return 1.0 if mesh.devices.flat[0].platform == "cpu" else 8.0


def _to_host(features: Features, number: int) -> Features:
    return jax.tree.map(lambda x: np.asarray(x)[:number], features)


def concatenate(batches: list[Features]) -> Features:
    """Returns the items of several Features as one."""
    return jax.tree.map(lambda *xs: np.concatenate(xs), *batches)


def load_checkpoint(workdir, step: str, ema: bool = False):
    """Loads a trained model from a workdir's checkpoint: `(Evaluator, params, step)`. LoRA's adapters are merged.

    The checkpoint alone is enough. `step` is "best", "latest" or a number; `ema` takes the averaged parameters. Raises
    CheckpointError if there is no such checkpoint, if it or its format cannot be read, or if it has no averaged
    parameters.
    """
    mesh = make_mesh()
    with Checkpoints(workdir) as checkpoints:
        step_number = checkpoints.resolve_step(step)
        meta = checkpoints.meta(step_number)
        config = ml_collections.ConfigDict(meta["config"])
        tokenizer = make_tokenizer(config, meta["tokenizer"])
        model = build_model(config, tokenizer.vocab_size)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *dummy_inputs(config))
        sharding = replicated(mesh)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        if ema and not config.train.get("ema_decay"):
            raise CheckpointError(
                f"{workdir}: was trained without averaged parameters (train.ema_decay=0); leave --ema out"
            )
        params, constants = split_constants(abstract)
        multipliers = optim.lr_multipliers(params, config.train.lr_multipliers, config.train.layer_decay)
        abstract_ema = {"ema": optim.select_trainable(params, multipliers)} if ema else {}
        restored = checkpoints.restore(step_number, {"params": params, "constants": constants} | abstract_ema)
    params = optim.merge(restored["ema"], restored["params"]) if ema else restored["params"]
    variables = model.merge_adapters(params | {"constants": restored["constants"]})
    return Evaluator(model, tokenizer, config, mesh, meta.get("data")), variables, step_number


def load_zero_shot(config: ml_collections.ConfigDict):
    """Loads a pretrained CLIP or SigLIP without training it: `(Evaluator, params)`.

    Raises ConfigError for any model, tower or pooling that would leave parameters random.
    """
    check_options(config)
    if config.model not in JOINT_SYSTEMS:
        raise ConfigError(
            f"model={config.model} has to be trained; without training, give --config=FILE.py:model=clip or siglip"
        )
    if (config.image.pooling, config.text.pooling) != ("tower", "tower"):
        raise ConfigError("image.pooling and text.pooling must be tower: other poolings need trained projections")
    resolved = resolve(config)
    config, pretrained, tokenizer_json = resolved.config, resolved.towers, resolved.tokenizer_json
    lacking = [kind for kind in ("image", "text") if kind not in pretrained or pretrained[kind].projection is None]
    if lacking:
        raise ConfigError(
            f"{lacking[0]}.pretrained={config[lacking[0]].pretrained!r}: give a CLIP or SigLIP checkpoint with its "
            "projection; any other tower has to be trained first"
        )
    mesh, tokenizer = make_mesh(), make_tokenizer(config, tokenizer_json)
    towers.check_vocabulary(config, tokenizer.vocab_size)
    model = build_model(config, tokenizer.vocab_size)
    params = towers.insert_pretrained(model.init(jax.random.key(0), *dummy_inputs(config)), pretrained)
    return Evaluator(model, tokenizer, config, mesh), jax.device_put(params, replicated(mesh))
