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
from mefn_jax import losses, optim, start, state, step
from mefn_jax.checkpoint import Checkpoints, git_commit, sources, versions
from mefn_jax.data import tokenizer as tokens
from mefn_jax.data.dataset import HELD_OUT, Dataset
from mefn_jax.data.images import resize_of
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.distributed import agree, from_first, together
from mefn_jax.errors import CheckpointError, ConfigError, OtherProcessError, UnreadableCheckpointError
from mefn_jax.evaluator import Evaluator, fitted, open_dataset
from mefn_jax.logs import header, say
from mefn_jax.model import CHOICES, Model, build, empty_images, empty_texts
from mefn_jax.sharding import abstract, arranged, check_divides, placed
from mefn_jax.towers import as_saved, check_vocabulary, load, with_pretrained


@dataclasses.dataclass(frozen=True)
class Data:
    """The configuration as it fits the data, and the splits."""

    config: ConfigDict
    dataset: Dataset
    train: Split
    val: Split

    @property
    def steps(self) -> int:
        """How many steps the run has in all."""
        t = self.config.train
        return t.steps or math.ceil(t.epochs * self.train.captions / t.batch_size)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run before its next step: `done` of `steps` are done, `current` is the state, `meta` what its checkpoints say
    beside it, `evaluator` has the model, the tokenizer and the mesh."""

    config: ConfigDict
    train: Split
    val: Split
    evaluator: Evaluator
    recipe: step.Recipe
    schedule: optax.Schedule
    steps: int
    done: int
    current: state.TrainState
    meta: dict


def checked(config: ConfigDict) -> ConfigDict:
    """The configuration. Raises ConfigError for values that cannot work."""
    configuration.check(config, CHOICES | losses.CHOICES)
    configuration.check_local("data.dir", config.data.dir)
    return config


def open_data(config: ConfigDict, mesh) -> Data:
    """Opens the data set. Raises ConfigError or DataError where it does not fit the configuration."""
    check_divides(config.train.batch_size, config.train.encoder_parts, mesh)
    dataset = open_dataset(config)
    train_split = dataset.split("train")
    val_split = dataset.split(HELD_OUT if config.data.hold_out else "val").head(config.eval.val_images)
    if train_split.captions < config.train.batch_size:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} exceeds the {train_split.captions} training captions"
        )
    return Data(fitted(fitted(config, train_split), val_split), dataset, train_split, val_split)


def begin(data: Data, checkpoints: Checkpoints, workdir, mesh) -> Run:
    """The run's next beginning, from the latest checkpoint if there is one. Raises ConfigError where hosts differ,
    UnreadableCheckpointError, CheckpointError or WeightsError."""
    config, done = data.config, checkpoints.latest or 0
    agree(facts(data, workdir) | {"latest checkpoint": str(done)})
    if done:
        saved = read(lambda: checkpoints.meta(done))
        config, tokenizer = resumed(config, saved, workdir)
        towers = {}
    else:
        config, towers, json = together(lambda: load(config))
        tokenizer = new_tokenizer(config, json, data.dataset, data.train)
    agree({"tokenizer": hashlib.sha256(tokenizer.json.encode()).hexdigest()[:12]})
    model = build(config, tokenizer.vocab_size)
    init = initialiser(model, config, mesh)
    schedule = optim.schedule(config.train.learning_rate, data.steps, config.train.warmup)
    shapes = jax.eval_shape(init)
    factors = optim.rate_factors(shapes, config.train.multipliers, config.train.layer_decay)
    if done:
        check_frozen(factors, shapes, ConfigDict(saved["config"]).train, workdir)
    optimizer = optim.adamw(schedule, config.train.weight_decay, config.train.clip_norm, factors)
    new = functools.partial(state.create, init, optimizer, factors, averaged=config.train.ema > 0)
    evaluator = Evaluator(model, tokenizer, config, mesh)
    current = restored(new, checkpoints, mesh) if done else begun(new, towers, factors, evaluator, data.train)
    recipe, meta = step.recipe(config, model, optimizer, factors), described(config, tokenizer)
    return Run(config, data.train, data.val, evaluator, recipe, schedule, data.steps, done, current, meta)


def facts(data: Data, workdir) -> dict[str, str]:
    """What has to be the same on all hosts, in words."""
    options = {key: str(value) for key, value in configuration.flatten(data.config.to_dict()).items()}
    options |= {"data": f"{data.train.images} images, {data.train.captions} captions in train"}
    return options | {"commit": git_commit(), "code": sources(), "workdir": str(workdir)} | versions()


def new_tokenizer(config, json: str | None, dataset, split: Split) -> Tokenizer:
    """The tokenizer of the pretrained text tower, whose text is `json`; without one that of the data set; without that
    one trained on the captions of `split`. Raises WeightsError if it has more tokens than the embedding."""
    t = config.text
    if json is None:
        check_text(config, dataset.facts)
        json = dataset.tokenizer_json
    if json is None:
        say(f"training a tokenizer on the {split.captions:,} training captions (kept in the checkpoints)")
        size = t.vocab_size or tokens.VOCAB_SIZE
        # Training it gives another one in every process.
        json = from_first(lambda: tokens.train(split.texts(), size, t.lower_case, t.punctuation))
    tokenizer = Tokenizer(json, t.max_words, t.lower_case, t.punctuation)
    check_vocabulary(config, tokenizer.vocab_size)
    return tokenizer


def initialiser(model: Model, config, mesh):
    """`init() -> params`, random from the seed. Only the inputs' shapes matter: parameters do not depend on values."""
    inputs = empty_images(config, mesh.size), *empty_texts(config, mesh.size)
    return functools.partial(model.init, jax.random.key(config.train.seed), *inputs)


def begun(new, towers: dict, factors, evaluator: Evaluator, split: Split) -> state.TrainState:
    """The state that `new(mesh)` makes, with the pretrained towers' parameters, and what begins from the training
    data (`start.py`) where the configuration says so."""
    mesh = evaluator.mesh
    current = new(mesh)
    params = placed(mesh, with_pretrained(current.params, towers))
    if evaluator.config.train.start == "linear":
        params = placed(mesh, start.from_training_data(evaluator, params, split))
    # A copy, since the step is given the state's arrays to write into.
    ema = None if current.ema is None else jax.tree.map(jnp.copy, optim.trainable(params, factors))
    return current.replace(params=params, ema=ema)


def restored(new, checkpoints: Checkpoints, mesh) -> state.TrainState:
    """The latest checkpoint's state, in the shapes that `new(mesh)` would make, laid out as this run lays it."""
    shapes = abstract(mesh, jax.eval_shape(functools.partial(new, mesh)))
    return read(lambda: checkpoints.restore(checkpoints.latest, shapes))


def read(part):
    """What `part()` reads of a checkpoint, on all processes. Raises UnreadableCheckpointError on all if one cannot."""
    try:
        return together(part)
    except OtherProcessError as e:
        raise UnreadableCheckpointError(f"the latest checkpoint: {e}") from e


def described(config, tokenizer: Tokenizer) -> dict:
    """What a checkpoint says of itself beside the state and the step (DESIGN.md 7)."""
    return {
        "config": config.to_dict(),
        "tokenizer": tokenizer.json,
        "preprocessing": dataclasses.asdict(resize_of(config.image)),
        "commit": git_commit(),
        "versions": versions(),
    }


def resumed(config, meta: dict, workdir) -> tuple[ConfigDict, Tokenizer]:
    """The configuration and the tokenizer of a run that goes on. Raises CheckpointError naming the keys in which the
    model differs from the checkpoint's; says what else differs."""
    config = as_saved(config, ConfigDict(meta["config"]))
    changed = configuration.differences(meta["config"], config.to_dict())
    model = {k: v for k, v in changed.items() if k.split(".")[0] in configuration.MODEL_KEYS}
    if model:
        listed = "; ".join(f"{k}: {old!r} there, {new!r} here" for k, (old, new) in model.items())
        raise CheckpointError(f"{workdir} holds a run with another model ({listed}); choose another --workdir")
    for key, (old, new) in changed.items():
        say(f"note: {key} was {old!r} in this workdir and is now {new!r}")
    if bool(config.train.ema) != bool(meta["config"]["train"].get("ema")):
        raise CheckpointError(f"{workdir}: train.ema cannot be switched on or off in a run; choose another --workdir")
    t = config.text
    return config, Tokenizer(meta["tokenizer"], t.max_words, t.lower_case, t.punctuation)


def check_frozen(factors, shapes, saved, workdir) -> None:
    """Raises CheckpointError if other parameters are frozen now than in the run so far (`saved` is its
    `config.train`): the optimiser has no state for those."""
    before = optim.rate_factors(shapes, saved.multipliers, saved.layer_decay)
    if jax.tree.map(bool, before) != jax.tree.map(bool, factors):
        raise CheckpointError(
            f"{workdir}: train.multipliers freezes other parameters than this run was begun with "
            f"({tuple(saved.multipliers)}); keep them, or choose another --workdir"
        )


def check_text(config, facts: dict) -> None:
    """Raises ConfigError if text normalisation differs from what the data set's tokenizer was trained with."""
    for key in ("lower_case", "punctuation"):
        if config.text[key] != facts.get(key, config.text[key]):
            raise ConfigError(
                f"text.{key}={config.text[key]!r}, but the data set was prepared with {facts[key]!r}; set "
                f"--config.text.{key}={facts[key]} or prepare it again with --{key}={config.text[key]}"
            )


def announce(run: Run, workdir) -> None:
    """Says what runs where."""
    config, mesh, train_split, val_split = run.config, run.evaluator.mesh, run.train, run.val
    frozen = state.count(optim.frozen(run.current.params, run.recipe.factors))
    parameters = f"{state.count(run.current.params):,} parameters" + (f", {frozen:,} of them frozen" if frozen else "")
    device = mesh.devices.flat[0]
    version = versions()
    for split in (train_split, val_split):
        if split.skipped:
            say(
                f"data: left out {len(split.skipped)} images of {split.name} that cannot be decoded: "
                f"{', '.join(split.skipped[:5])}"
            )
    header(
        {
            "model": f"{config.model}, {parameters}",
            "data": f"{config.data.dir or 'drawn scenes'}: train {train_split.images:,} images, "
            f"{train_split.captions:,} captions; {val_split.name} {val_split.images:,}, {val_split.captions:,}",
            "devices": f"{mesh.size} x {device.device_kind}, {jax.process_count()} process(es), {arranged(mesh)}",
            "batch": f"{config.train.batch_size} pairs, {config.train.batch_size // mesh.size} a device",
            "steps": f"{run.steps:,} ({run.steps * config.train.batch_size / train_split.captions:.1f} epochs)"
            + (f", resuming after {run.done:,}" if run.done else ""),
            "seed": str(config.train.seed),
            "commit": git_commit(),
            "versions": ", ".join(f"{name} {version[name]}" for name in ("python", "jax", "flax", "orbax-checkpoint")),
            "workdir": str(workdir),
        }
    )
