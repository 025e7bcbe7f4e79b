"""The training loop, top to bottom."""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from tqdm import tqdm

from mefn_jax import config as configuration
from mefn_jax import losses, optim, start, state, step
from mefn_jax.checkpoint import Checkpoints, git_commit, versions
from mefn_jax.data import pipeline
from mefn_jax.data import tokenizer as tokens
from mefn_jax.data.augment import Augment
from mefn_jax.data.dataset import HELD_OUT
from mefn_jax.data.images import resize_of
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.errors import CheckpointError, ConfigError
from mefn_jax.evaluator import Evaluator, fitted, open_dataset
from mefn_jax.logs import StepLog, Writer, header, say
from mefn_jax.model import CHOICES, Model, build, empty_images, empty_texts
from mefn_jax.remote import directory
from mefn_jax.sharding import check_divides, from_first, make_mesh, put_rows, replicated
from mefn_jax.towers import as_saved, check_vocabulary, load, with_pretrained


def train(config: ConfigDict, workdir) -> None:
    """Trains as configured, from the workdir's latest checkpoint if it has one. See `train.py` for the order of a step.

    Raises ConfigError, DataError, CheckpointError or TrainingError; complete checkpoints are never harmed.
    """
    configuration.check(config, CHOICES | losses.CHOICES)
    workdir = directory("--workdir", workdir)
    configuration.check_local("data.dir", config.data.dir)
    mesh = make_mesh()
    check_divides("train.batch_size", config.train.batch_size, mesh)
    dataset = open_dataset(config)
    train_split = dataset.split("train")
    val_split = dataset.split(HELD_OUT if config.data.hold_out else "val").head(config.eval.val_images)
    if train_split.captions < config.train.batch_size:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} exceeds the {train_split.captions} training captions"
        )
    config = fitted(fitted(config, train_split), val_split)
    steps = config.train.steps or math.ceil(config.train.epochs * train_split.captions / config.train.batch_size)

    with Checkpoints(workdir, create=True) as checkpoints:
        done = checkpoints.latest or 0
        if done:
            saved = checkpoints.meta(done)
            config, tokenizer = resumed(config, saved, workdir)
            towers = {}
        else:
            config, towers, json = load(config)
            tokenizer = new_tokenizer(config, json, dataset, train_split)
        model = build(config, tokenizer.vocab_size)
        init = initialiser(model, config, mesh)
        schedule = optim.schedule(config.train.learning_rate, steps, config.train.warmup)
        shapes = jax.eval_shape(init)
        factors = optim.rate_factors(shapes, config.train.multipliers, config.train.layer_decay)
        if done:
            check_frozen(factors, shapes, ConfigDict(saved["config"]).train, workdir)
        optimizer = optim.adamw(schedule, config.train.weight_decay, config.train.clip_norm, factors)
        new = functools.partial(state.create, init, optimizer, factors, averaged=config.train.ema > 0)
        evaluator = Evaluator(model, tokenizer, config, mesh)
        current = restored(new, checkpoints, mesh) if done else begun(new, towers, factors, evaluator, train_split)
        frozen = state.count(optim.frozen(current.params, factors))
        parameters = f"{state.count(current.params):,} parameters" + (f", {frozen:,} of them frozen" if frozen else "")
        announce(config, workdir, mesh, train_split, val_split, parameters, steps, done)
        if done >= steps:
            say(f"step {done} of {steps} is done already; nothing to train")
            return

        meta = described(config, tokenizer)
        train_step = step.compile_step(
            mesh,
            model=model,
            optimizer=optimizer,
            factors=factors,
            loss_at=losses.build(config.loss),
            seed=config.train.seed,
            ema=config.train.ema,
            tile_mib=config.train.tile_mib,
        )
        batches = training_batches(config, train_split, tokenizer, done, mesh)
        writer, log = Writer(workdir, done), StepLog(config, schedule, steps)
        bar = tqdm(total=steps, initial=done, unit=" steps", disable=None, leave=False)
        c = config.train
        try:
            for k in range(done, steps):
                waiting = time.perf_counter()
                batch, captions = next(batches)
                log.clock.waited(waiting)
                with jax.transfer_guard("disallow"):
                    current, metrics = train_step(current, batch)
                log.add(k + 1, metrics, captions)
                bar.update()
                last = k + 1 == steps
                evaluating, saving = last or (k + 1) % c.eval_every == 0, (k + 1) % c.save_every == 0
                # The log lags one step behind, so that reading it never waits for the device; nothing unread may be
                # evaluated or saved, since it might not be finite.
                log.write(writer, bar, everything=evaluating or saving)
                if evaluating:
                    rsum = evaluate(evaluator, current.params, val_split, k + 1, writer, bar)
                    if current.ema is not None:  # what is averaged is what counts
                        params = state.averaged_params(current, factors)
                        rsum = evaluate(evaluator, params, val_split, k + 1, writer, bar, "ema")
                if evaluating or saving:
                    try:
                        writer.flush()  # before the checkpoint, whose resumption needs the lines up to it
                    finally:
                        checkpoints.save(k + 1, current, meta | {"step": k + 1}, rsum if evaluating else None)
                    log.clock.reset()
        finally:
            batches.close()
            bar.close()
            writer.close()
        checkpoints.wait()
        best = f"best rSum of {val_split.name} at step {checkpoints.best}"
        say(f"done: {steps} steps; {best}; checkpoints in {checkpoints.directory}")


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
    """The state that `new(sharding)` makes, with the pretrained towers' parameters, and what begins from the training
    data (`start.py`) where the configuration says so."""
    where = replicated(evaluator.mesh)
    current = new(where)
    params = jax.device_put(with_pretrained(current.params, towers), where)
    if evaluator.config.train.start == "linear":
        params = jax.device_put(start.from_training_data(evaluator, params, split), where)
    # A copy, since the step is given the state's arrays to write into.
    ema = None if current.ema is None else jax.tree.map(jnp.copy, optim.trainable(params, factors))
    return current.replace(params=params, ema=ema)


def restored(new, checkpoints: Checkpoints, mesh) -> state.TrainState:
    """The latest checkpoint's state, in the shapes that `new(sharding)` would make, laid out as this run lays it."""
    where = replicated(mesh)
    shapes = jax.eval_shape(functools.partial(new, where))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)
    return checkpoints.restore(checkpoints.latest, abstract)


def described(config, tokenizer: Tokenizer) -> dict:
    """What a checkpoint says of itself beside the state and the step (DESIGN.md 7)."""
    return {
        "config": config.to_dict(),
        "tokenizer": tokenizer.json,
        "preprocessing": dataclasses.asdict(resize_of(config.image)),
        "commit": git_commit(),
        "versions": versions(),
    }


def training_dataset(config, split: Split, tokenizer: Tokenizer, process=(0, 1)):
    """`pipeline.training_dataset` as configured."""
    d, t = config.data, config.train
    resize, augment = resize_of(config.image), Augment(**config.augment)
    return pipeline.training_dataset(split, tokenizer, resize, t.batch_size, t.seed, process, d.twins_together, augment)


def training_batches(config, split: Split, tokenizer: Tokenizer, done: int, mesh):
    """An iterator over the batches from step `done` on, as global arrays on the devices, each with the captions of
    this process's rows; close it when done."""
    d = config.data
    dataset = training_dataset(config, split, tokenizer, (jax.process_index(), jax.process_count()))

    def put(batch):
        return put_rows(mesh, batch), batch["caption"]

    return pipeline.iterate(dataset, done, d.threads, d.workers, put)


def evaluate(evaluator: Evaluator, params, split, done: int, writer: Writer, bar, name="") -> float:
    """Scores a split, logs it under its name, or as `name`, returns rSum."""
    start = time.perf_counter()
    result = evaluator.rsum(params, split)
    learned = {name: float(value) for name, value in evaluator.model.learned(params).items()}
    name = name or split.name
    seconds = {f"{'' if name == split.name else name + '_'}eval_seconds": time.perf_counter() - start}
    writer.write(done, configuration.flatten({name: result, "matcher": learned}) | seconds)
    sides = [" ".join(f"{result[d][r]:.1f}" for r in ("r1", "r5", "r10")) for d in ("i2t", "t2i")]
    scalars = "".join(f"  {name} {value:.2f}" for name, value in learned.items())
    with bar.external_write_mode():
        say(
            f"{name}  {split.images} images: R@1/5/10  image to text {sides[0]}  text to image {sides[1]}  "
            f"rSum {result['rsum']:.1f}{scalars}  ({time.perf_counter() - start:.0f} s)"
        )
    return result["rsum"]


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


def announce(config, workdir, mesh, train_split, val_split, parameters: str, steps: int, done: int) -> None:
    """What runs where."""
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
            "devices": f"{mesh.size} x {device.device_kind}, {jax.process_count()} process(es)",
            "batch": f"{config.train.batch_size} pairs, {config.train.batch_size // mesh.size} a device",
            "steps": f"{steps:,} ({steps * config.train.batch_size / train_split.captions:.1f} epochs)"
            + (f", resuming after {done:,}" if done else ""),
            "seed": str(config.train.seed),
            "commit": git_commit(),
            "versions": ", ".join(f"{name} {version[name]}" for name in ("python", "jax", "flax", "orbax-checkpoint")),
            "workdir": str(workdir),
        }
    )
