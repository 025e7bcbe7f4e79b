"""Runs the training loop, from top to bottom. Everything before the first step is in `training/setup.py`."""

import contextlib
import dataclasses
import time

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from mefn_jax import config as configuration
from mefn_jax.config import count_pairs
from mefn_jax.data import pipeline
from mefn_jax.encoders.inputs import batch_shapes
from mefn_jax.errors import UnreadableCheckpointError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.reports import explanation
from mefn_jax.resolve import validate
from mefn_jax.runtime import flops
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.runtime.chips import chip_of
from mefn_jax.runtime.console import print0, tolerate_faults
from mefn_jax.runtime.lock import hold_lock
from mefn_jax.runtime.multihost import (
    broadcast_text,
    check_workdir_is_shared,
    exit_all_on_error,
    on_all_processes,
)
from mefn_jax.runtime.preemption import Preemption
from mefn_jax.runtime.sharding import from_local_rows, local_rows, make_mesh
from mefn_jax.runtime.storage import resolve_directory
from mefn_jax.runtime.trace import Profile
from mefn_jax.training import state, step
from mefn_jax.training.header import print_header
from mefn_jax.training.logs import MetricsWriter, StepLog
from mefn_jax.training.patience import BestRecord
from mefn_jax.training.setup import Run, is_evaluation_due, open_data, set_up_run
from mefn_jax.training.trackers import check_trackers

SAVE_TIMEOUT = 120  # seconds that a running save gets to finish when a process fails


def train(config: ConfigDict, workdir, profile: str = "") -> None:
    """Trains as configured, from the latest checkpoint of the workdir if it has one. `train.py` gives the order of a
    step; `profile` is START:N (see `Profile`), or empty. On SIGTERM, SIGINT or SIGHUP, saves and returns.

    Raises ConfigError, DataError, LockError, CheckpointError or TrainingError. Complete checkpoints are never harmed;
    an unreadable one is moved aside, and the one before it is used.
    """
    # `on_all_processes`, here and below: an error on one process stops all of them, instead of leaving some to wait.
    workdir, trace = on_all_processes(lambda: (resolve_directory("--workdir", workdir), Profile(profile)))
    on_all_processes(lambda: check_trackers(config) if jax.process_index() == 0 else None)
    mesh = on_all_processes(lambda: make_mesh(validate(config).mesh))
    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(Preemption())
        # One lock for all processes of the run, which process 0 holds.
        check_lock = on_all_processes(
            lambda: stack.enter_context(hold_lock("--workdir", workdir)) if jax.process_index() == 0 else None
        )
        data = on_all_processes(lambda: open_data(config, mesh))
        check_workdir_is_shared(workdir)
        checkpoints = stack.enter_context(Checkpoints(workdir, create=True, check_lock=check_lock))
        run = set_up_from_readable_checkpoint(data, checkpoints, workdir, mesh)
        print_header(run, workdir)
        if run.first_step >= run.steps and not run.evaluates_first:
            print0(f"step {run.first_step} of {run.steps} is done already; nothing to train")
        elif run.best.is_exhausted(run.config.train.patience):
            print0(f"{describe_stop(run, run.best, run.first_step)} already; nothing to train")
        else:
            run_loop(run, checkpoints, preemption, trace, workdir)


def set_up_from_readable_checkpoint(data, checkpoints: Checkpoints, workdir, mesh) -> Run:
    """Sets the run up from the newest readable checkpoint. Unreadable ones are moved to WORKDIR/unreadable, but only
    after another could be read: if none can, the cause lies elsewhere (rights, versions), and all stay. Raises
    CheckpointError if no checkpoint can be read."""
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
        print0(f"moved unreadable checkpoints to {workdir}/unreadable")
    return run


def run_loop(run: Run, checkpoints: Checkpoints, preemption: Preemption, trace: Profile, workdir) -> None:
    """Runs the remaining steps, after the evaluation of the first one if that is missing."""
    config, train_config, steps, train_state = run.config, run.config.train, run.steps, run.state
    mesh = run.evaluator.mesh
    train_step = step.compile_step(mesh, train_state, run.step_config)
    batches = training_batches(run)
    writer = on_all_processes(lambda: MetricsWriter(workdir, run.first_step, config))
    log = StepLog(config, jax.device_get(run.hyper).learning_rate_at, steps, ideal_step_seconds(run))
    bar = tqdm(total=steps, initial=run.first_step, unit=" steps", disable=None, leave=False)
    completed, stopping, best = run.first_step, False, run.best
    with exit_all_on_error(lambda: checkpoints.wait(SAVE_TIMEOUT)):
        try:
            if run.evaluates_first:
                best = evaluate_and_record(run, train_state, completed, checkpoints, writer, bar, best)
            while completed < steps and not stopping and not best.is_exhausted(train_config.patience):
                trace.on_step_start(completed, workdir, train_state)
                wait_start = time.perf_counter()
                batch, caption_indices = next(batches)
                log.clock.add_data_wait(wait_start)
                with jax.transfer_guard("disallow"):
                    train_state, metrics = train_step(train_state, batch, run.hyper)
                trace.on_step_end(completed, metrics)
                completed += 1
                log.add(completed, metrics, caption_indices)
                bar.update()
                stopping = preemption.should_stop(completed) and completed < steps
                # A preempted run saves without evaluating: little time is left. Resuming makes up for it.
                evaluating = is_evaluation_due(completed, steps, train_config) and not stopping
                saving = evaluating or stopping or completed % train_config.save_every == 0
                # The log lags one step behind, so that reading it never waits for the device. Before a save all steps
                # are read, because a loss that is not finite must stop the run first.
                log.write(writer, bar, flush=saving)
                if saving:
                    # The log is copied before the checkpoint, because a resumed run needs the lines up to it. If it
                    # cannot be copied, save first, then raise.
                    try:
                        writer.flush()
                    finally:
                        position = run.start.after(completed, count_pairs(config))
                        progress = {"examples": position.examples, "best": dataclasses.asdict(best)}
                        checkpoints.save(completed, train_state, run.meta | progress)
                if evaluating:  # after the save: an evaluation that fails must not cost the training since the last one
                    best = evaluate_and_record(run, train_state, completed, checkpoints, writer, bar, best)
                if saving:
                    log.clock.reset()
        finally:
            batches.close()
            bar.close()
            writer.close()
            trace.close()
        checkpoints.wait()
    if stopping:
        print0(f"{preemption.cause}: saved step {completed}; run the same command to resume")
        return
    if best.is_exhausted(train_config.patience) and completed < steps:
        print0(describe_stop(run, best, completed))
    where = f"best rSum of {run.val.name} at step {checkpoints.best}"
    print0(f"done: {completed} steps; {where}; checkpoints in {checkpoints.directory}")


def describe_stop(run: Run, best: BestRecord, completed: int) -> str:
    """Returns the message that a run stops, or has stopped, by `train.patience` after `completed` steps."""
    return (
        f"train.patience={run.config.train.patience}: rSum of {run.val.name} has not risen above {best.rsum:.1f} (step "
        f"{best.step}) in {best.since} evaluations; stopped after step {completed} of {run.steps}"
    )


def ideal_step_seconds(run: Run) -> float | None:
    """Returns the duration of a step at the devices' peak arithmetic (docs/method.md, Eq. 55); None for devices that
    `runtime/chips.py` does not list."""
    mesh = run.evaluator.mesh
    chip = chip_of(mesh.devices.flat[0])
    if chip is None:
        return None
    work = flops.step_flops(run.step_config, mesh, run.state.variables, batch_shapes(run.config))
    return sum(work.values()) / (chip.flops * mesh.size)


def training_batches(run: Run):
    """Returns an iterator over the remaining batches, as pairs of the batch in global arrays on the devices and the
    caption indices of this process's rows. Close it when done."""
    data_config, mesh = run.config.data, run.evaluator.mesh
    rows = local_rows(mesh, run.config.train.batch_size)
    dataset = pipeline.training_dataset_from_config(
        run.config, run.train, run.evaluator.tokenizer, rows, run.start.data_offset(count_pairs(run.config))
    )

    def to_devices(batch):
        return from_local_rows(mesh, batch), batch["caption_index"]

    return pipeline.iterate(dataset, run.first_step, data_config.threads, data_config.workers, to_devices)


def evaluate_and_record(
    run: Run, train_state, completed: int, checkpoints: Checkpoints, writer, bar, best: BestRecord
) -> BestRecord:
    """Evaluates the state after `completed` steps on val, and the moving average if there is one, and records rSum.
    Returns the record of the evaluations so far, the same on all processes."""
    rsum = evaluate_and_log(run.evaluator, train_state.variables, run.val, completed, writer, bar)
    if train_state.ema is not None:  # the moving average chooses the best checkpoint
        params = state.ema_params(train_state, run.step_config.lr_multipliers)
        rsum = evaluate_and_log(run.evaluator, params, run.val, completed, writer, bar, "ema")
    rsum = float(broadcast_text(lambda: repr(float(rsum))))
    checkpoints.record_rsum(completed, rsum)
    writer.flush()
    return best.add(completed, rsum)


def evaluate_and_log(evaluator: Evaluator, params, split, completed: int, writer: MetricsWriter, bar, name="") -> float:
    """Scores a split, logs the metrics under its name (or under `name`), and returns rSum."""
    start, prefix = time.perf_counter(), f"{name}_" if name else ""
    images, texts = evaluator.encode(params, split)
    metrics = evaluator.evaluate(params, images, texts, split)
    learned = {scalar: float(value) for scalar, value in evaluator.model.scalars(params).items()}
    values = {name or split.name: metrics, f"{prefix}matcher": learned}
    if evaluator.model.has_entropies:
        with tolerate_faults("statistics of pairs"):
            values[f"{prefix}pairs"] = explanation.mean_statistics(evaluator, params, split, images, texts)
    if explanation.can_explain(evaluator):
        with tolerate_faults("pictures of pairs"):
            write_pictures(evaluator, params, split, images, texts, completed, writer, prefix)
    values[f"{prefix}eval_seconds"] = time.perf_counter() - start
    writer.write(completed, configuration.flatten(values))
    recalls = [
        " ".join(f"{metrics[direction][recall]:.1f}" for recall in ("r1", "r5", "r10")) for direction in ("i2t", "t2i")
    ]
    scalars = "".join(f"  {scalar} {value:.2f}" for scalar, value in learned.items())
    with bar.external_write_mode():
        print0(
            f"{name or split.name}  {split.num_images} images: R@1/5/10  image to text {recalls[0]}  "
            f"text to image {recalls[1]}  rSum {metrics['rsum']:.1f}{scalars}  ({time.perf_counter() - start:.0f} s)"
        )
    return metrics["rsum"]


def write_pictures(evaluator: Evaluator, params, split, images, texts, completed: int, writer, prefix: str) -> None:
    """Writes TensorBoard images of some explained pairs of a split, `eval.explained_pairs` of them."""
    caption_indices = explanation.evenly_spaced(evaluator.config.eval.explained_pairs, split.num_captions)
    if not caption_indices:
        return
    explanations = explanation.explain_captions(evaluator, params, split, images, texts, caption_indices)
    if jax.process_index() == 0:  # drawing takes seconds, and only process 0 writes
        from mefn_jax.reports import figures  # imports matplotlib, which only this needs

        writer.write_images(completed, f"{prefix}explained", map(figures.draw_pixels, explanations))
