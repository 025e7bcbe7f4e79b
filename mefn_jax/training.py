"""The training loop, top to bottom."""

import functools
import itertools
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from mefn_jax import config as configuration
from mefn_jax import losses, optim, state, step
from mefn_jax.checkpoint import Checkpoints, git_commit, versions
from mefn_jax.data import pipeline
from mefn_jax.data.tokenizer import Tokenizer, read_json
from mefn_jax.errors import CheckpointError, ConfigError, TrainingError
from mefn_jax.evaluate import Evaluator, open_dataset
from mefn_jax.logs import Clock, Writer, duration, header, say
from mefn_jax.model import CHOICES, adopt, build, with_pretrained
from mefn_jax.sharding import check_divides, make_mesh, put_rows, replicated


def train(config: ConfigDict, workdir) -> None:
    """Trains as configured, from the workdir's latest checkpoint if it has one. See `train.py` for the order of a step.

    Raises ConfigError, DataError, CheckpointError or TrainingError; complete checkpoints are never harmed.
    """
    configuration.check(config, CHOICES | losses.CHOICES)
    configuration.check_local("--workdir", workdir)
    configuration.check_local("data.dir", config.data.dir)
    mesh = make_mesh()
    check_divides("train.batch_size", config.train.batch_size, mesh)
    dataset = open_dataset(config.data)
    if not config.text.pretrained:
        check_text(config, dataset.facts)
    train_split, val_split = dataset.split("train"), dataset.split("val").head(config.eval.val_images)
    if train_split.captions < config.train.batch_size:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} exceeds the {train_split.captions} training captions"
        )
    t = config.text
    json = read_json(t.pretrained) if t.pretrained else dataset.tokenizer_json
    tokenizer = Tokenizer(json, t.max_words, t.lower_case, t.punctuation)
    steps = config.train.steps or math.ceil(config.train.epochs * train_split.captions / config.train.batch_size)

    with Checkpoints(workdir, create=True) as checkpoints:
        done = checkpoints.latest or 0
        config, towers = adopt(config, tokenizer.vocab_size)
        if done:
            tokenizer = resume_tokenizer(checkpoints.meta(done), config, workdir, tokenizer)
        model = build(config, tokenizer.vocab_size)
        pixels = jnp.ones((mesh.size, config.image.size, config.image.size, 3), jnp.uint8)
        # Only the shapes matter: parameters do not depend on the values seen at init.
        ids, mask = (jnp.ones((mesh.size, t.max_words + 2), dtype) for dtype in (jnp.int32, bool))
        init = functools.partial(model.init, jax.random.key(config.train.seed), pixels, ids, mask)
        schedule = optim.schedule(config.train.learning_rate, steps, config.train.warmup)
        factors = optim.rate_factors(jax.eval_shape(init), config.train.multipliers, config.train.layer_decay)
        optimizer = optim.adamw(schedule, config.train.weight_decay, config.train.clip_norm, factors)
        new = functools.partial(state.create, init, optimizer, factors)
        if done:
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
                jax.eval_shape(functools.partial(new, replicated(mesh))),
            )
            current = checkpoints.restore(done, abstract)
        else:
            current = new(replicated(mesh))
            params = jax.device_put(with_pretrained(current.params, towers), replicated(mesh))
            current = current.replace(params=params)
        announce(config, workdir, mesh, train_split, val_split, state.count(current.params), steps, done)
        if done >= steps:
            say(f"step {done} of {steps} is done already; nothing to train")
            return

        meta = {
            "config": config.to_dict(),
            "tokenizer": tokenizer.json,
            "preprocessing": {"size": config.image.size, "resize": "shorter side, centre crop, bilinear"},
            "commit": git_commit(),
            "versions": versions(),
        }
        evaluator = Evaluator(model, tokenizer, config, mesh)
        train_step = step.compile_step(
            mesh,
            model=model,
            optimizer=optimizer,
            factors=factors,
            loss_at=losses.build(config.loss),
            seed=config.train.seed,
        )
        process = (jax.process_index(), jax.process_count())
        batches = pipeline.iterate(
            pipeline.training_dataset(
                train_split,
                tokenizer,
                config.image.size,
                config.train.batch_size,
                config.train.seed,
                process,
                config.data.twins_together,
            ),
            done,
            config.data.threads,
            config.data.workers,
        )
        writer, log = Writer(workdir, done), StepLog(config, schedule, steps)
        bar = tqdm(total=steps, initial=done, unit=" steps", disable=None, leave=False)
        c = config.train
        try:
            for k in range(done, steps):
                waiting = time.perf_counter()
                batch = next(batches)
                log.clock.waited(waiting)
                captions = batch.pop("caption")
                with jax.transfer_guard("disallow"):
                    current, metrics = train_step(current, put_rows(mesh, batch))
                log.add(k + 1, metrics, captions)
                bar.update()
                last = k + 1 == steps
                evaluating, saving = last or (k + 1) % c.eval_every == 0, (k + 1) % c.save_every == 0
                # The log lags one step behind, so that reading it never waits for the device; nothing unread may be
                # evaluated or saved, since it might not be finite.
                log.write(writer, bar, everything=evaluating or saving)
                if evaluating:
                    rsum = evaluate(evaluator, current.params, val_split, k + 1, writer, bar)
                if evaluating or saving:
                    checkpoints.save(k + 1, current, meta | {"step": k + 1}, rsum if evaluating else None)
                    log.clock.reset()
        finally:
            batches.close()
            bar.close()
            writer.close()
        checkpoints.wait()
        say(f"done: {steps} steps; best val rSum at step {checkpoints.best}; checkpoints in {checkpoints.directory}")


class StepLog:
    """Collects each step's metrics on the device and writes a line every `log_every` steps, one step late."""

    def __init__(self, config, schedule, steps: int):
        self.clock = Clock()
        self._every, self._batch = config.train.log_every, config.train.batch_size
        self._schedule, self._steps = schedule, steps
        self._window, self._first = [], True

    def add(self, done: int, metrics: dict, captions) -> None:
        """Metrics on the device of the step after which `done` are done, and its batch's captions."""
        self._window.append((done, metrics, captions))
        if self._first:  # compilation is no part of a step's time
            jax.block_until_ready(metrics)
            say(f"first step, compilation included: {self.clock.elapsed:.1f} s")
            self.clock.reset()
            self._first = False

    def write(self, writer: Writer, bar, everything: bool) -> None:
        """Checks and logs what is due. Raises TrainingError at the first step whose loss is not finite."""
        due = len(self._window) if everything else len(self._window) - 1
        if not everything and (due < 1 or self._window[due - 1][0] % self._every):
            return
        window, self._window = self._window[:due], self._window[due:]
        values = [(done, jax.device_get(m), captions) for done, m, captions in window]
        for done, m, captions in values:
            if not np.isfinite(m["loss"]) or not np.isfinite(m["grad_norm"]):
                raise TrainingError(
                    f"step {done}: loss {m['loss']}, gradient norm {m['grad_norm']}; captions of the batch (positions "
                    f"in the training split): {captions.tolist()}. Lower train.learning_rate, or look at these; the "
                    "latest checkpoint is from before"
                )
        seconds = self.clock.elapsed / max(1, len(values))
        for _, line in itertools.groupby(values, key=lambda v: (v[0] - 1) // self._every):
            self._line(writer, bar, list(line), seconds)
        if values:
            self.clock.reset()

    def _line(self, writer: Writer, bar, values: list, seconds: float) -> None:
        """One line for some steps' values; `seconds` is what a step took."""
        done, m, _ = values[-1]
        line = {
            "loss": float(np.mean([v["loss"] for _, v, _ in values])),
            "grad_norm": float(m["grad_norm"]),
            "learning_rate": float(self._schedule(done - 1)),
            "ms_per_step": 1000 * seconds,
            "pairs_per_s": self._batch / seconds,
            "data_wait": self.clock.data / self.clock.elapsed,
        }
        writer.write(done, line)
        with bar.external_write_mode():
            say(
                f"step {done:>{len(str(self._steps))}}/{self._steps}  loss {line['loss']:8.4f}  "
                f"grad {line['grad_norm']:7.3f}  lr {line['learning_rate']:.2e}  {line['ms_per_step']:7.1f} ms/step  "
                f"{line['pairs_per_s']:7.0f} pairs/s  data {line['data_wait']:4.0%}  "
                f"ETA {duration(seconds * (self._steps - done))}"
            )


def evaluate(evaluator: Evaluator, params, split, done: int, writer: Writer, bar) -> float:
    """Scores val, logs it, returns rSum."""
    start = time.perf_counter()
    result = evaluator.rsum(params, split)
    learned = {name: float(value) for name, value in evaluator.model.learned(params).items()}
    flat = configuration.flatten({"val": result, "matcher": learned})
    writer.write(done, flat | {"eval_seconds": time.perf_counter() - start})
    sides = [" ".join(f"{result[d][r]:.1f}" for r in ("r1", "r5", "r10")) for d in ("i2t", "t2i")]
    scalars = "".join(f"  {name} {value:.2f}" for name, value in learned.items())
    with bar.external_write_mode():
        say(
            f"val  {split.images} images: R@1/5/10  image to text {sides[0]}  text to image {sides[1]}  "
            f"rSum {result['rsum']:.1f}{scalars}  ({time.perf_counter() - start:.0f} s)"
        )
    return result["rsum"]


def resume_tokenizer(meta: dict, config, workdir, tokenizer: Tokenizer) -> Tokenizer:
    """The checkpoint's tokenizer. Raises CheckpointError naming the keys in which the model differs from the
    checkpoint's; says what else differs."""
    changed = configuration.differences(meta["config"], config.to_dict())
    model = {k: v for k, v in changed.items() if k.split(".")[0] in configuration.MODEL_KEYS}
    if model:
        listed = "; ".join(f"{k}: {old!r} there, {new!r} here" for k, (old, new) in model.items())
        raise CheckpointError(f"{workdir} holds a run with another model ({listed}); choose another --workdir")
    for key, (old, new) in changed.items():
        say(f"note: {key} was {old!r} in this workdir and is now {new!r}")
    if meta["tokenizer"] != tokenizer.json:
        say("note: the data set's tokenizer differs from the checkpoint's, which is kept")
    t = config.text
    return Tokenizer(meta["tokenizer"], t.max_words, t.lower_case, t.punctuation)


def check_text(config, facts: dict) -> None:
    """Raises ConfigError if text normalisation differs from what the data set's tokenizer was trained with."""
    for key in ("lower_case", "punctuation"):
        if config.text[key] != facts[key]:
            raise ConfigError(
                f"text.{key}={config.text[key]!r}, but the data set was prepared with {facts[key]!r}; set "
                f"--config.text.{key}={facts[key]} or prepare it again with --{key}={config.text[key]}"
            )


def announce(config, workdir, mesh, train_split, val_split, parameters: int, steps: int, done: int) -> None:
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
            "model": f"{config.model}, {parameters:,} parameters",
            "data": f"{config.data.dir or 'drawn scenes'}: train {train_split.images:,} images, "
            f"{train_split.captions:,} captions; val {val_split.images:,}, {val_split.captions:,}",
            "devices": f"{mesh.size} x {device.device_kind}, {jax.process_count()} process(es)",
            "batch": f"{config.train.batch_size} pairs, {config.train.batch_size // mesh.size} a device",
            "steps": f"{steps:,} ({steps * config.train.batch_size / train_split.captions:.1f} epochs)"
            + (f", resuming after {done:,}" if done else ""),
            "seed": str(config.train.seed),
            "commit": git_commit(),
            "versions": ", ".join(f"{name} {version[name]}" for name in ("python", "jax", "flax", "orbax-checkpoint")),
            "workdir": str(Path(workdir)),
        }
    )
