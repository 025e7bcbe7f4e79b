"""The training loop, top to bottom; what comes before the first step is in `beginning.py`."""

import time

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from mefn_jax import config as configuration
from mefn_jax.data import pipeline
from mefn_jax.errors import UnreadableCheckpointError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.model import batch_shapes
from mefn_jax.reports import explanation
from mefn_jax.resolve import validate
from mefn_jax.runtime import flops
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.runtime.chips import chip_of
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.multihost import check_workdir_is_shared, exit_all_on_error, on_all_processes
from mefn_jax.runtime.preemption import Preemption
from mefn_jax.runtime.sharding import from_local_rows, local_rows, make_mesh
from mefn_jax.runtime.storage import resolve_directory
from mefn_jax.runtime.trace import Profile
from mefn_jax.training import state, step
from mefn_jax.training.logs import MetricsWriter, StepLog
from mefn_jax.training.setup import Run, open_data, print_header, set_up_run

SAVE_TIMEOUT = 120  # seconds that a save under way has when a process fails


def train(config: ConfigDict, workdir, profile: str = "") -> None:
    """Trains as configured, from the workdir's latest checkpoint if it has one. See `train.py` for the order of a step,
    `Profile` for `profile`. On SIGTERM it saves and returns.

    Raises ConfigError, DataError, CheckpointError or TrainingError; complete checkpoints are never harmed. One that
    cannot be read is moved aside, and the one before is used.
    """
    workdir, trace = on_all_processes(lambda: (resolve_directory("--workdir", workdir), Profile(profile)))
    mesh = on_all_processes(lambda: make_mesh(validate(config).mesh))
    data = on_all_processes(lambda: open_data(config, mesh))
    check_workdir_is_shared(workdir)
    with Preemption() as preemption, Checkpoints(workdir, create=True) as checkpoints:
        run = set_up_from_readable_checkpoint(data, checkpoints, workdir, mesh)
        print_header(run, workdir)
        if run.first_step >= run.steps:
            print0(f"step {run.first_step} of {run.steps} is done already; nothing to train")
        else:
            run_loop(run, checkpoints, preemption, trace, workdir)


def set_up_from_readable_checkpoint(data, checkpoints: Checkpoints, workdir, mesh) -> Run:
    """`begin` from the newest checkpoint that can be read; those that cannot are moved away, but only once another
    could be: what hinders them all is no fault of theirs. Raises CheckpointError if there is none."""
    run, skipped = None, False
    while run is None:
        try:
            run = set_up_run(data, checkpoints, workdir, mesh)
        except UnreadableCheckpointError as e:
            checkpoints.skip(e)
            skipped = True
            print0(f"warning: {e}; trying the one before")
    if skipped:
        on_all_processes(lambda: checkpoints.quarantine() if jax.process_index() == 0 else None)
        checkpoints.reload()
        print0(f"moved what cannot be read to {workdir}/unreadable")
    return run


def run_loop(run: Run, checkpoints: Checkpoints, preemption: Preemption, trace: Profile, workdir) -> None:
    """All steps that are still to be done."""
    config, c, steps, current = run.config, run.config.train, run.steps, run.state
    mesh, evaluator = run.evaluator.mesh, run.evaluator
    train_step = step.compile_step(mesh, current, run.recipe)
    batches = training_batches(run)
    writer = on_all_processes(lambda: MetricsWriter(workdir, run.first_step))
    log = StepLog(config, run.schedule, steps, ideal_step_seconds(run))
    bar = tqdm(total=steps, initial=run.first_step, unit=" steps", disable=None, leave=False)
    with exit_all_on_error(lambda: checkpoints.wait(SAVE_TIMEOUT)):
        try:
            for k in range(run.first_step, steps):
                trace.on_step_start(k, workdir, current)
                waiting = time.perf_counter()
                batch, captions = next(batches)
                log.clock.add_data_wait(waiting)
                with jax.transfer_guard("disallow"):
                    current, metrics = train_step(current, batch)
                trace.on_step_end(k, metrics)
                log.add(k + 1, metrics, captions)
                bar.update()
                last = k + 1 == steps
                stopping = preemption.should_stop(k + 1) and not last
                evaluating = last or ((k + 1) % c.eval_every == 0 and not stopping)
                saving = stopping or (k + 1) % c.save_every == 0
                # The log lags one step behind, so that reading it never waits for the device; nothing unread may be
                # evaluated or saved, since it might not be finite.
                log.write(writer, bar, flush=evaluating or saving)
                if evaluating:
                    rsum = evaluate_and_log(evaluator, current.params, run.val, k + 1, writer, bar)
                    if current.ema is not None:  # what is averaged is what counts
                        params = state.ema_params(current, run.recipe.factors)
                        rsum = evaluate_and_log(evaluator, params, run.val, k + 1, writer, bar, "ema")
                if evaluating or saving:
                    try:
                        writer.flush()  # before the checkpoint, whose resumption needs the lines up to it
                    finally:
                        meta = run.meta | {"step": k + 1}
                        checkpoints.save(k + 1, current, meta, rsum if evaluating else None)
                    log.clock.reset()
                if stopping:
                    break
        finally:
            batches.close()
            bar.close()
            writer.close()
            trace.close()
        checkpoints.wait()
    if stopping:
        print0(f"told to end (SIGTERM): saved step {k + 1}; the same command goes on from there")
        return
    best = f"best rSum of {run.val.name} at step {checkpoints.best}"
    print0(f"done: {steps} steps; {best}; checkpoints in {checkpoints.directory}")


def ideal_step_seconds(run: Run) -> float | None:
    """What a step would take at the devices' peak; None for devices that `chips.py` does not know."""
    mesh = run.evaluator.mesh
    chip = chip_of(mesh.devices.flat[0])
    if chip is None:
        return None
    work = flops.step_flops(run.recipe, mesh, run.state.params, batch_shapes(run.config))
    return sum(work.values()) / (chip.flops * mesh.size)


def training_batches(run: Run):
    """An iterator over the batches that are still to come, as global arrays on the devices, each with the captions of
    this process's rows; close it when done."""
    d, mesh = run.config.data, run.evaluator.mesh
    rows = local_rows(mesh, run.config.train.batch_size)
    dataset = pipeline.training_dataset_from_config(run.config, run.train, run.evaluator.tokenizer, rows)

    def put(batch):
        return from_local_rows(mesh, batch), batch["caption_index"]

    return pipeline.iterate(dataset, run.first_step, d.threads, d.workers, put)


def evaluate_and_log(evaluator: Evaluator, params, split, done: int, writer: MetricsWriter, bar, name="") -> float:
    """Scores a split, logs it under its name, or as `name`, returns rSum."""
    start, prefix = time.perf_counter(), f"{name}_" if name else ""
    images, texts = evaluator.encode(params, split)
    result = evaluator.evaluate(params, images, texts, split)
    learned = {name: float(value) for name, value in evaluator.model.scalars(params).items()}
    values = {name or split.name: result, "matcher": learned}
    if explanation.can_explain(evaluator):
        values[f"{prefix}pairs"] = explanation.mean_statistics(evaluator, params, split, images, texts)
        if drawn := explanation.evenly_spaced(evaluator.config.eval.explained_pairs, split.num_captions):
            explained = explanation.explain_captions(evaluator, params, split, images, texts, drawn)
            if jax.process_index() == 0:  # drawing takes seconds, and only process 0 writes
                from mefn_jax.reports import figures  # imports matplotlib, which only this needs

                writer.write_images(done, f"{prefix}explained", map(figures.draw_pixels, explained))
    values[f"{prefix}eval_seconds"] = time.perf_counter() - start
    writer.write(done, configuration.flatten(values))
    sides = [" ".join(f"{result[d][r]:.1f}" for r in ("r1", "r5", "r10")) for d in ("i2t", "t2i")]
    scalars = "".join(f"  {name} {value:.2f}" for name, value in learned.items())
    with bar.external_write_mode():
        print0(
            f"{name or split.name}  {split.num_images} images: R@1/5/10  image to text {sides[0]}  "
            f"text to image {sides[1]}  rSum {result['rsum']:.1f}{scalars}  ({time.perf_counter() - start:.0f} s)"
        )
    return result["rsum"]
