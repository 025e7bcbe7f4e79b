"""What comes before the first step: data, towers, tokenizer and state, new or from a checkpoint, on all hosts."""

import dataclasses
import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mefn_jax import config as configuration
from mefn_jax import optim
from mefn_jax.data import tokenizer as tokens
from mefn_jax.data.dataset import HELD_OUT, Dataset
from mefn_jax.data.from_config import fill_data_widths, make_tokenizer, open_dataset
from mefn_jax.data.images import resize_from_config
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.encoders.pretrained.towers import check_vocabulary, insert_pretrained, keep_saved_options, load_pretrained
from mefn_jax.errors import CheckpointError, ConfigError, OtherProcessError, UnreadableCheckpointError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.model import Model, build_model, dummy_inputs
from mefn_jax.runtime.checkpoint import Checkpoints, code_digest, git_commit, versions
from mefn_jax.runtime.console import print0, print_rows
from mefn_jax.runtime.multihost import broadcast_text, check_processes_agree, on_all_processes
from mefn_jax.runtime.sharding import abstract_params, check_divides, describe_mesh, shard_params
from mefn_jax.training import cca_init, state, step


@dataclasses.dataclass(frozen=True)
class Datasets:
    """The configuration as it fits the data, and the splits."""

    config: ConfigDict
    dataset: Dataset
    train: Split
    val: Split

    @property
    def steps(self) -> int:
        """How many steps the run has in all."""
        t = self.config.train
        return t.steps or math.ceil(t.epochs * self.train.num_captions / t.batch_size)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run before its next step: `done` of `steps` are done, `current` is the state, `meta` what its checkpoints say
    beside it, `evaluator` has the model, the tokenizer and the mesh."""

    config: ConfigDict
    train: Split
    val: Split
    evaluator: Evaluator
    recipe: step.StepConfig
    schedule: optax.Schedule
    steps: int
    first_step: int
    state: state.TrainState
    meta: dict


def open_data(config: ConfigDict, mesh) -> Datasets:
    """Opens the data set. Raises ConfigError or DataError where it does not fit the configuration."""
    check_divides(config.train.batch_size, config.train.grad_cache_chunks, mesh)
    dataset = open_dataset(config)
    train_split = dataset.split("train")
    val_split = dataset.split(HELD_OUT if config.data.held_out_images else "val").first_images(config.eval.val_images)
    if train_split.num_captions < config.train.batch_size:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} exceeds the {train_split.num_captions} training captions"
        )
    return Datasets(fill_data_widths(fill_data_widths(config, train_split), val_split), dataset, train_split, val_split)


def set_up_run(data: Datasets, checkpoints: Checkpoints, workdir, mesh) -> Run:
    """The run's next beginning, from the latest checkpoint if there is one. Raises ConfigError where hosts differ,
    UnreadableCheckpointError, CheckpointError or WeightsError."""
    config, done = data.config, checkpoints.latest or 0
    check_processes_agree(run_fingerprint(data, workdir) | {"latest checkpoint": str(done)})
    if done:
        saved = read_on_all_processes(lambda: checkpoints.meta(done))
        config, tokenizer = resume_config(config, saved, workdir)
        towers = {}
    else:
        config, towers, json = on_all_processes(lambda: load_pretrained(config))
        tokenizer = choose_tokenizer(config, json, data.dataset, data.train)
    check_processes_agree({"tokenizer": hashlib.sha256(tokenizer.json.encode()).hexdigest()[:12]})
    model = build_model(config, tokenizer.vocab_size)
    init = make_init(model, config, mesh)
    schedule = optim.lr_schedule(config.train.learning_rate, data.steps, config.train.warmup_fraction)
    shapes = jax.eval_shape(init)
    factors = optim.lr_multipliers(shapes, config.train.lr_multipliers, config.train.layer_decay)
    if done:
        check_frozen(factors, shapes, ConfigDict(saved["config"]).train, workdir)
    optimizer = optim.adamw(schedule, config.train.weight_decay, config.train.clip_norm, factors)
    new = functools.partial(state.create_state, init, optimizer, factors, averaged=config.train.ema_decay > 0)
    evaluator = Evaluator(model, tokenizer, config, mesh)
    current = (
        restore_state(new, checkpoints, mesh) if done else initial_state(new, towers, factors, evaluator, data.train)
    )
    recipe, meta = step.make_step_config(config, model, optimizer, factors), checkpoint_metadata(config, tokenizer)
    return Run(config, data.train, data.val, evaluator, recipe, schedule, data.steps, done, current, meta)


def run_fingerprint(data: Datasets, workdir) -> dict[str, str]:
    """What has to be the same on all hosts, in words."""
    options = {key: str(value) for key, value in configuration.flatten(data.config.to_dict()).items()}
    options |= {"data": f"{data.train.num_images} images, {data.train.num_captions} captions in train"}
    return options | {"commit": git_commit(), "code": code_digest(), "workdir": str(workdir)} | versions()


def choose_tokenizer(config, json: str | None, dataset, split: Split) -> Tokenizer:
    """The tokenizer of the pretrained text tower, whose text is `json`; without one that of the data set; without that
    one trained on the captions of `split`. Raises WeightsError if it has more tokens than the embedding."""
    t = config.text
    if json is None:
        check_normalization(config, dataset.metadata)
        json = dataset.tokenizer_json
    if json is None:
        print0(f"training a tokenizer on the {split.num_captions:,} training captions (kept in the checkpoints)")
        size = t.vocab_size or tokens.VOCAB_SIZE
        # Training it gives another one in every process.
        json = broadcast_text(lambda: tokens.train_tokenizer(split.all_captions(), size, t.lower_case, t.punctuation))
    tokenizer = make_tokenizer(config, json)
    check_vocabulary(config, tokenizer.vocab_size)
    return tokenizer


def make_init(model: Model, config, mesh):
    """`init() -> params`, random from the seed. Only the inputs' shapes matter: parameters do not depend on values."""
    inputs = dummy_inputs(config, mesh.size)
    return functools.partial(model.init, jax.random.key(config.train.seed), *inputs)


def initial_state(new, towers: dict, factors, evaluator: Evaluator, split: Split) -> state.TrainState:
    """The state that `new(mesh)` makes, with the pretrained towers' parameters, and what begins from the training
    data (`start.py`) where the configuration says so."""
    mesh = evaluator.mesh
    current = new(mesh)
    params = shard_params(mesh, insert_pretrained(current.params, towers))
    if evaluator.config.train.init == "cca":
        params = shard_params(mesh, cca_init.init_from_training_data(evaluator, params, split))
    # A copy, since the step is given the state's arrays to write into.
    ema = None if current.ema is None else jax.tree.map(jnp.copy, optim.trainable(params, factors))
    return current.replace(params=params, ema=ema)


def restore_state(new, checkpoints: Checkpoints, mesh) -> state.TrainState:
    """The latest checkpoint's state, in the shapes that `new(mesh)` would make, laid out as this run lays it."""
    shapes = abstract_params(mesh, jax.eval_shape(functools.partial(new, mesh)))
    return read_on_all_processes(lambda: checkpoints.restore(checkpoints.latest, shapes))


def read_on_all_processes(part):
    """What `part()` reads of a checkpoint, on all processes. Raises UnreadableCheckpointError on all if one cannot."""
    try:
        return on_all_processes(part)
    except OtherProcessError as e:
        raise UnreadableCheckpointError(f"the latest checkpoint: {e}") from e


def checkpoint_metadata(config, tokenizer: Tokenizer) -> dict:
    """What a checkpoint says of itself beside the state and the step (DESIGN.md 7)."""
    return {
        "config": config.to_dict(),
        "tokenizer": tokenizer.json,
        "preprocessing": dataclasses.asdict(resize_from_config(config.image)),
        "commit": git_commit(),
        "versions": versions(),
    }


def resume_config(config, meta: dict, workdir) -> tuple[ConfigDict, Tokenizer]:
    """The configuration and the tokenizer of a run that goes on. Raises CheckpointError naming the keys in which the
    model differs from the checkpoint's; says what else differs."""
    config = keep_saved_options(config, ConfigDict(meta["config"]))
    changed = configuration.diff_configs(meta["config"], config.to_dict())
    model = {k: v for k, v in changed.items() if k.split(".")[0] in configuration.MODEL_KEYS}
    if model:
        listed = "; ".join(f"{k}: {old!r} there, {new!r} here" for k, (old, new) in model.items())
        raise CheckpointError(f"{workdir} holds a run with another model ({listed}); choose another --workdir")
    for key, (old, new) in changed.items():
        print0(f"note: {key} was {old!r} in this workdir and is now {new!r}")
    if bool(config.train.ema_decay) != bool(meta["config"]["train"].get("ema_decay")):
        raise CheckpointError(
            f"{workdir}: train.ema_decay cannot be switched on or off in a run; choose another --workdir"
        )
    return config, make_tokenizer(config, meta["tokenizer"])


def check_frozen(factors, shapes, saved, workdir) -> None:
    """Raises CheckpointError if other parameters are frozen now than in the run so far (`saved` is its
    `config.train`): the optimiser has no state for those."""
    before = optim.lr_multipliers(shapes, saved.lr_multipliers, saved.layer_decay)
    if jax.tree.map(bool, before) != jax.tree.map(bool, factors):
        raise CheckpointError(
            f"{workdir}: train.lr_multipliers freezes other parameters than this run was begun with "
            f"({tuple(saved.lr_multipliers)}); keep them, or choose another --workdir"
        )


def check_normalization(config, facts: dict) -> None:
    """Raises ConfigError if text normalisation differs from what the data set's tokenizer was trained with."""
    for key in ("lower_case", "punctuation"):
        if config.text[key] != facts.get(key, config.text[key]):
            raise ConfigError(
                f"text.{key}={config.text[key]!r}, but the data set was prepared with {facts[key]!r}; set "
                f"--config.text.{key}={facts[key]} or prepare it again with --{key}={config.text[key]}"
            )


def print_header(run: Run, workdir) -> None:
    """Says what runs where."""
    config, mesh, train_split, val_split = run.config, run.evaluator.mesh, run.train, run.val
    frozen = state.num_params(optim.frozen(run.state.params, run.recipe.factors))
    parameters = f"{state.num_params(run.state.params):,} parameters" + (
        f", {frozen:,} of them frozen" if frozen else ""
    )
    device = mesh.devices.flat[0]
    version = versions()
    for split in (train_split, val_split):
        if split.skipped:
            print0(
                f"data: left out {len(split.skipped)} images of {split.name} that cannot be decoded: "
                f"{', '.join(split.skipped[:5])}"
            )
    print_rows(
        {
            "model": f"{config.model}, {parameters}",
            "data": f"{config.data.dir or 'drawn scenes'}: train {train_split.num_images:,} images, "
            f"{train_split.num_captions:,} captions; {val_split.name} {val_split.num_images:,}, {val_split.num_captions:,}",
            "devices": f"{mesh.size} x {device.device_kind}, {jax.process_count()} process(es), {describe_mesh(mesh)}",
            "batch": f"{config.train.batch_size} pairs, {config.train.batch_size // mesh.size} a device",
            "steps": f"{run.steps:,} ({run.steps * config.train.batch_size / train_split.num_captions:.1f} epochs)"
            + (f", resuming after {run.first_step:,}" if run.first_step else ""),
            "seed": str(config.train.seed),
            "commit": git_commit(),
            "versions": ", ".join(f"{name} {version[name]}" for name in ("python", "jax", "flax", "orbax-checkpoint")),
            "workdir": str(workdir),
        }
    )
