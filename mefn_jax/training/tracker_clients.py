"""Clients of experiment trackers, one small class each: Weights & Biases, MLflow, trackio.

Each class has the same four parts: `propose_id(run)`, the identifier of a new run, or None where the service chooses
it; the constructor, which begins a run or, with the `run_id` of an earlier process, goes on with it; `log`; `finish`.
Any of them may raise, and may wait for a network: they are called from a thread of their own (`training/trackers.py`).
The packages are imported only here, when a run is begun.
"""

import dataclasses
import logging
import time
import uuid
from pathlib import Path

from mefn_jax.config import flatten

BEGIN_SECONDS = 20.0  # that W&B gets to begin a run, before it is tried again later
FINISH_SECONDS = 10.0  # that a client gets for what is pending when a training ends


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """A training run as trackers show it.

    Attributes:
        project: the group of runs (an experiment in MLflow).
        name: the name of the run.
        config: its options, nested.
        folder: a directory on this machine for a client's own files; None: the client's default.
    """

    project: str
    name: str
    config: dict
    folder: Path | None


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the log: the values of some metrics after `step` steps."""

    step: int
    values: dict[str, float]


class WandbClient:
    """A run in Weights & Biases. Charts have the training step, the metric `step`, as their axis: the steps that W&B
    counts itself cannot go back, as they would have to where an evaluation is made up for after a resume."""

    def __init__(self, run: TrackedRun, run_id: str | None):
        import wandb

        # The timeouts hold at the exit of the process, too, for which W&B waits whatever its thread does.
        timeouts = {"init_timeout": BEGIN_SECONDS, "finish_timeout": FINISH_SECONDS}
        settings = wandb.Settings(console="off", silent=True, **timeouts)
        folder = None if run.folder is None else str(run.folder)
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run_id,
            resume="allow",
            config=run.config,
            allow_val_change=True,  # a resumed run may have other options
            dir=folder,
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")
        self.id, self.place = run_id, "" if self._run.offline else self._run.url

    @staticmethod
    def propose_id(run: TrackedRun) -> str | None:
        """Returns an identifier that no other run has."""
        return uuid.uuid4().hex[:16]

    def log(self, lines: list[Line]) -> None:
        """Sends lines."""
        for line in lines:
            self._run.log(line.values | {"step": line.step})

    def finish(self, failed: bool) -> None:
        """Ends the run, or this part of it."""
        self._run.finish(exit_code=int(failed))


class MlflowClient:
    """A run in MLflow, on the server that MLFLOW_TRACKING_URI names. Options are its parameters, written once: MLflow
    refuses to change them."""

    def __init__(self, run: TrackedRun, run_id: str | None):
        import mlflow

        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each of its attempts is a warning
        self._mlflow, self._client = mlflow, mlflow.MlflowClient()
        self.id = self._create(run) if run_id is None else run_id
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
        self.place = ""

    def _create(self, run: TrackedRun) -> str:
        experiment = self._client.get_experiment_by_name(run.project)
        number = self._client.create_experiment(run.project) if experiment is None else experiment.experiment_id
        created = self._client.create_run(number, run_name=run.name).info.run_id
        options = [self._mlflow.entities.Param(key, str(value)) for key, value in flatten(run.config).items()]
        for k in range(0, len(options), 100):  # as many as MLflow takes at once
            self._client.log_batch(created, params=options[k : k + 100])
        return created

    @staticmethod
    def propose_id(run: TrackedRun) -> str | None:
        """Returns None: the server chooses."""

    def log(self, lines: list[Line]) -> None:
        """Sends lines."""
        now, metric = int(1000 * time.time()), self._mlflow.entities.Metric
        metrics = [metric(name, value, now, line.step) for line in lines for name, value in line.values.items()]
        for k in range(0, len(metrics), 1000):  # as many as MLflow takes at once
            self._client.log_batch(self.id, metrics=metrics[k : k + 1000])

    def finish(self, failed: bool) -> None:
        """Ends the run, or this part of it."""
        self._client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


class TrackioClient:
    """A run in trackio, on this machine or, with TRACKIO_SPACE_ID, on a Space of Hugging Face. Its identifier is its
    name, by which trackio finds a run again."""

    def __init__(self, run: TrackedRun, run_id: str | None):
        import trackio

        self._run = trackio.init(project=run.project, name=run_id, resume="allow", config=run.config, embed=False)
        self.id, self.place = run_id, ""

    @staticmethod
    def propose_id(run: TrackedRun) -> str | None:
        """Returns the name of the run with some random letters."""
        return f"{run.name.replace('/', '-')}-{uuid.uuid4().hex[:8]}"

    def log(self, lines: list[Line]) -> None:
        """Sends lines."""
        for line in lines:
            self._run.log(dict(line.values), step=line.step)

    def finish(self, failed: bool) -> None:
        """Ends the run, or this part of it."""
        self._run.finish()


TRACKERS = {"wandb": WandbClient, "mlflow": MlflowClient, "trackio": TrackioClient}
