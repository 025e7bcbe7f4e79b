"""Setup of a training run: data, towers, tokenizer and state, new or from a checkpoint, on all hosts."""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mefn_jax import config as configuration
from mefn_jax import optim
from mefn_jax.config import count_pairs
from mefn_jax.data import tokenizer as tokens
from mefn_jax.data.dataset import HELD_OUT, Dataset
from mefn_jax.data.digests import digest_data
from mefn_jax.data.from_config import make_tokenizer, open_dataset
from mefn_jax.data.images import resize_from_config
from mefn_jax.data.negatives import digest_file, read_negatives
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.encoders.inputs import dummy_inputs
from mefn_jax.encoders.pretrained.towers import check_vocabulary, insert_pretrained
from mefn_jax.errors import ConfigError, OtherProcessError, UnreadableCheckpointError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.model import Model, build_model, split_constants
from mefn_jax.resolve import resolve
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.runtime.checkpoint_format import CHECKPOINT_FORMAT
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.multihost import broadcast_text, check_processes_agree, on_all_processes
from mefn_jax.runtime.provenance import code_digest, git_commit, params_digest, versions
from mefn_jax.runtime.sharding import (
    abstract_params,
    check_divides,
    from_full_copy,
    replicated,
    shard_params,
)
from mefn_jax.training import cca_init, state, step
from mefn_jax.training.hyperparameters import Hyperparameters, hyperparameters_from_config
from mefn_jax.training.init_from import Source, load_source, note_differences
from mefn_jax.training.patience import BestRecord, restore_record
from mefn_jax.training.position import Position
from mefn_jax.training.resume_checks import check_frozen, check_resumes, check_same_data, check_same_negatives


@dataclasses.dataclass(frozen=True)
class Datasets:
    """Data of a run.

    Attributes:
        config: the configuration as the command gives it.
        dataset: the data set.
        train, val: its splits for training and for evaluation during training.
        negatives: the SHA-256 of the file of hard negatives; None without one.
    """

    config: ConfigDict
    dataset: Dataset
    train: Split
    val: Split
    negatives: str | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run before its next step.

    Attributes:
        config: the configuration, complete.
        train, val: the splits.
        evaluator: the compiled model with its tokenizer and mesh.
        step_config: what every step needs besides state and batch.
        hyper: the hyperparameters, on the devices.
        steps: number of steps of the whole run.
        start: the position from which the run goes on.
        evaluates_first: whether the evaluation at `start` is missing: the run was stopped between save and evaluation.
        state: the train state.
        best: the record of the evaluations so far.
        meta: what checkpoints store besides state and step (`checkpoint_metadata`).
    """

    config: ConfigDict
    train: Split
    val: Split
    evaluator: Evaluator
    step_config: step.StepConfig
    hyper: Hyperparameters
    steps: int
    start: Position
    evaluates_first: bool
    state: state.TrainState
    best: BestRecord
    meta: dict

    @property
    def first_step(self) -> int:
        """Returns the number of completed steps, the index of the next one."""
        return self.start.step


def open_data(config: ConfigDict, mesh) -> Datasets:
    """Opens the data set of a configuration. Raises ConfigError or DataError if the two do not fit."""
    check_divides(config.train.batch_size, config.train.grad_cache_chunks, mesh)
    dataset = open_dataset(config)
    train_split = dataset.split("train")
    val_split = dataset.split(HELD_OUT if config.data.held_out_images else "val").first_images(config.eval.val_images)
    if train_split.num_captions < count_pairs(config):
        of_pairs = f" with data.views={config.data.views}" if config.data.views > 1 else ""
        raise ConfigError(
            f"train.batch_size={config.train.batch_size}{of_pairs} exceeds the {train_split.num_captions} training "
            "captions"
        )
    Position().count_steps(config, train_split.num_captions)  # raises if there are too many
    negatives = None
    if config.data.negatives:
        read_negatives(config.data.negatives, train_split)  # raises if they are of other data
        negatives = digest_file(config.data.negatives)
    return Datasets(config, dataset, train_split, val_split, negatives)


def set_up_run(data: Datasets, checkpoints: Checkpoints, workdir, mesh) -> Run:
    """Sets up the run: from its latest checkpoint, or new. Raises ConfigError if hosts differ,
    UnreadableCheckpointError, CheckpointError or WeightsError."""
    first_step, splits, start = checkpoints.latest or 0, (data.train, data.val), Position()
    digests = on_all_processes(lambda: digest_data(data.dataset))
    fingerprint = run_fingerprint(data, workdir) | {f"digest of {part}": str(x) for part, x in digests.items()}
    fingerprint, best = fingerprint | {"hard negatives": str(data.negatives)}, BestRecord()
    check_processes_agree(fingerprint | {"latest checkpoint": str(first_step)})
    if first_step:
        saved_meta = read_on_all_processes(lambda: checkpoints.meta(first_step))
        saved_config = ConfigDict(saved_meta["config"])
        resolved = on_all_processes(lambda: resolve(data.config, splits, saved_config))
        config = resolved.config
        check_resumes(config, saved_meta["config"], workdir)
        check_same_data(saved_meta.get("data"), digests, config.data.dir, workdir)
        check_same_negatives(saved_meta, data.config.data.negatives, data.negatives, workdir)
        best = restore_record(saved_meta, checkpoints)
        tokenizer = make_tokenizer(config, saved_meta["tokenizer"])
        start = Position(first_step, saved_meta["examples"])
    else:
        source = on_all_processes(lambda: load_source(data.config))
        resolved = on_all_processes(lambda: resolve(data.config, splits, source and source.config))
        config = resolved.config
        if source is None:
            tokenizer = choose_tokenizer(config, resolved.tokenizer_json, data.dataset, data.train)
        else:
            note_differences(config, source)
            check_processes_agree({"parameters of train.init_from": params_digest(source.variables)})
            tokenizer = make_tokenizer(config, source.tokenizer_json)
    check_processes_agree({"tokenizer": hashlib.sha256(tokenizer.json.encode()).hexdigest()[:12]})
    model = build_model(config, tokenizer.vocab_size)
    init = make_init(model, config, mesh)
    steps = start.count_steps(config, data.train.num_captions)
    hyper = hyperparameters_from_config(config, *start.schedule(config, data.train.num_captions))
    shapes, _ = split_constants(jax.eval_shape(init, hyper.seed))
    lr_multipliers = optim.lr_multipliers(shapes, config.train.lr_multipliers, config.train.layer_decay)
    if first_step:
        check_frozen(lr_multipliers, shapes, saved_config.train, workdir)
    step_config = step.make_step_config(config, model, lr_multipliers)
    optimizer, with_ema = step_config.make_optimizer(hyper), config.train.ema_decay > 0
    make_state = functools.partial(state.create_state, init, hyper.seed, optimizer, lr_multipliers, with_ema=with_ema)
    evaluator = Evaluator(model, tokenizer, config, mesh)
    train_state = (
        restore_state(make_state, checkpoints, mesh)
        if first_step
        else initial_state(make_state, resolved.towers, lr_multipliers, evaluator, data.train, source)
    )
    return Run(
        config=config,
        train=data.train,
        val=data.val,
        evaluator=evaluator,
        step_config=step_config,
        hyper=from_full_copy(replicated(mesh), hyper),
        steps=steps,
        start=start,
        evaluates_first=first_step > 0
        and is_evaluation_due(first_step, steps, config.train)
        and broadcast_text(lambda: str(checkpoints.is_evaluated(first_step))) == "False",
        state=train_state,
        best=best,
        meta=checkpoint_metadata(config, tokenizer, digests) | {"negatives": data.negatives},
    )


def is_evaluation_due(completed: int, steps: int, train_config) -> bool:
    """Returns whether a run of `steps` steps is evaluated after `completed` steps."""
    return completed == steps or completed % train_config.eval_every == 0


def run_fingerprint(data: Datasets, workdir) -> dict[str, str]:
    """Returns what has to be the same on all hosts, as `{name: text}`."""
    options = {key: str(value) for key, value in configuration.flatten(data.config.to_dict()).items()}
    options |= {"data": f"{data.train.num_images} images, {data.train.num_captions} captions in train"}
    return options | {"commit": git_commit(), "code": code_digest(), "workdir": str(workdir)} | versions()


def choose_tokenizer(config, json: str | None, dataset, split: Split) -> Tokenizer:
    """Returns the tokenizer of the run: that of the pretrained text tower (its text is `json`), else that of the data
    set, else one trained on the captions of `split`. Raises WeightsError if it has more tokens than the word embedding
    has rows."""
    text_config = config.text
    if json is None:
        check_normalization(config, dataset.metadata)
        json = dataset.tokenizer_json
    if json is None:
        print0(f"training a tokenizer on the {split.num_captions:,} training captions (saved in the checkpoints)")
        size = text_config.vocab_size or tokens.VOCAB_SIZE
        # Training is not deterministic between processes, so process 0 trains it for all.
        json = broadcast_text(
            lambda: tokens.train_tokenizer(split.all_captions(), size, text_config.lower_case, text_config.punctuation)
        )
    tokenizer = make_tokenizer(config, json)
    check_vocabulary(config, tokenizer.vocab_size)
    return tokenizer


def make_init(model: Model, config, mesh):
    """Returns the function `init(seed) -> variables` that draws random parameters from a seed. They depend on the
    shapes of the inputs, not on their values."""

    @jax.jit  # so that it is traced once, although its shapes are needed before its values
    def init(seed):
        return model.init(jax.random.key(seed), *dummy_inputs(config, mesh.size))

    return init


def initial_state(
    make_state, towers: dict, lr_multipliers, evaluator: Evaluator, split: Split, source: Source | None
) -> state.TrainState:
    """Returns the initial state: the random variables of `make_state(mesh)`, the pretrained towers in their places, and
    what begins as a function of the training data (`training/cca_init.py`): projections with train.init=cca, the hub
    vectors, and the constants of a matcher that has some. With a `source`, its variables are in their places instead,
    and only those that are new begin in the way above."""
    mesh = evaluator.mesh
    train_state = make_state(mesh)
    variables = shard_params(mesh, insert_pretrained(train_state.variables, towers))
    insert = (lambda variables: variables) if source is None else source.insert
    variables = shard_params(mesh, insert(variables))
    if source is None or not source.takes_all(variables):
        variables = cca_init.init_from_training_data(evaluator, variables, split)
        variables = shard_params(mesh, insert(variables))
    params, constants = split_constants(variables)
    # A copy, because the train step donates the arrays of its state.
    ema = None if train_state.ema is None else jax.tree.map(jnp.copy, optim.select_trainable(params, lr_multipliers))
    return train_state.replace(params=params, constants=constants, ema=ema)


def restore_state(make_state, checkpoints: Checkpoints, mesh) -> state.TrainState:
    """Returns the state of the latest checkpoint, in the shapes that `make_state(mesh)` would have, sharded over the
    mesh of this run."""
    shapes = abstract_params(mesh, jax.eval_shape(functools.partial(make_state, mesh)))
    return read_on_all_processes(lambda: checkpoints.restore(checkpoints.latest, shapes))


def read_on_all_processes(read):
    """Calls `read()`, which reads from the latest checkpoint, on all processes and returns its result. Raises
    UnreadableCheckpointError on all of them if one cannot read it."""
    try:
        return on_all_processes(read)
    except OtherProcessError as e:
        raise UnreadableCheckpointError(f"the latest checkpoint: {e}") from e


def checkpoint_metadata(config, tokenizer: Tokenizer, digests: dict) -> dict:
    """Returns what a checkpoint stores besides the state and the step (docs/training.md). `digests`: of the data, from
    `digest_data`."""
    return {
        "format": CHECKPOINT_FORMAT.number,
        "config": config.to_dict(),
        "tokenizer": tokenizer.json,
        "data": digests,
        "preprocessing": dataclasses.asdict(resize_from_config(config.image)),
        "commit": git_commit(),
        "versions": versions(),
    }


def check_normalization(config, metadata: dict) -> None:
    """Raises ConfigError if the text normalization differs from that of the data set, which its tokenizer was trained
    with."""
    for key in ("lower_case", "punctuation"):
        if config.text[key] != metadata.get(key, config.text[key]):
            raise ConfigError(
                f"text.{key}={config.text[key]!r}, but the data set was prepared with {metadata[key]!r}; set "
                f"--config.text.{key}={metadata[key]} or prepare it again with --{key}={config.text[key]}"
            )
