"""Stand-ins of wandb, mlflow and trackio: packages with the signatures that the clients of `log.to` call, which keep
their runs in a folder, so that they outlive a process that is killed.

    write_packages(folder)      writes the packages; put the folder on PYTHONPATH, and set FAKE_TRACKERS to a folder
    read_runs(store, tracker)   {run id: Kept} of what they were told

The signatures are those of wandb 0.31, mlflow 3.17 and trackio 0.43. With FAKE_TRACKERS_FAIL=NAME, the method NAME
raises ConnectionError; with FAKE_TRACKERS_HANG=NAME, it waits for ever.
"""

import dataclasses
import json
from pathlib import Path

COMMON = """
import json, os, threading, time, uuid
from pathlib import Path

STORE = Path(os.environ["FAKE_TRACKERS"])


def meet(name):
    if os.environ.get("FAKE_TRACKERS_FAIL") == name:
        raise ConnectionError(f"{name}: no route to host")
    if os.environ.get("FAKE_TRACKERS_HANG") == name:
        threading.Event().wait()


def tell(run_id, event, **values):
    with (STORE / f"{__name__}-{run_id}.jsonl").open("a") as file:
        file.write(json.dumps({"event": event} | values) + "\\n")


def exists(run_id):
    return (STORE / f"{__name__}-{run_id}.jsonl").exists()
"""
WANDB = """
class Settings:
    def __init__(self, *, console="auto", silent=False, finish_timeout=0.0, init_timeout=90.0, quiet=False):
        assert console in ("auto", "off", "wrap", "redirect", "wrap_raw", "wrap_emu") and finish_timeout > 0


def init(
    entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
    config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None, mode=None,
    force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None, tensorboard=None,
    sync_tensorboard=None, monitor_gym=None, settings=None,
):
    meet("init")
    assert isinstance(settings, Settings) and not set(id) & set("/\\\\#?%:") and resume in (None, "allow")
    assert resume == "allow" or not exists(id)
    assert dir is None or os.path.isdir(dir)
    tell(id, "begin", project=project, name=name, config=config)
    return Run(id)


class Run:
    def __init__(self, id):
        self.id, self.url, self.offline = id, f"https://host/{id}", False
        self._step_metric, self._done = None, False

    def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None, overwrite=None):
        assert name == "*"
        self._step_metric = step_metric

    def log(self, data, step=None, commit=None):
        meet("log")
        assert step is None and not self._done
        values = dict(data)
        tell(self.id, "log", step=values.pop(self._step_metric), values=values)

    def finish(self, exit_code=None):
        meet("finish")
        self._done = True
        tell(self.id, "end", failed=bool(exit_code))
"""
MLFLOW = """
from types import SimpleNamespace


class Metric:
    def __init__(self, key, value, timestamp, step, model_id=None, dataset_name=None, dataset_digest=None,
                 run_id=None):
        assert type(step) is int and type(timestamp) is int and type(value) is float
        self.key, self.value, self.step = key, value, step


class Param:
    def __init__(self, key, value):
        assert type(value) is str and len(value) <= 6000
        self.key, self.value = key, value


entities = SimpleNamespace(Metric=Metric, Param=Param)


class MlflowClient:
    def __init__(self, tracking_uri=None, registry_uri=None, workspace_store_uri=None):
        pass

    def get_experiment_by_name(self, name):
        meet("init")
        path = STORE / f"experiment-{name}"
        return SimpleNamespace(experiment_id=path.read_text()) if path.exists() else None

    def create_experiment(self, name, artifact_location=None, tags=None):
        (STORE / f"experiment-{name}").write_text("7")
        return "7"

    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        assert experiment_id == "7"
        run_id = uuid.uuid4().hex
        project = next(STORE.glob("experiment-*")).name.removeprefix("experiment-")
        tell(run_id, "begin", project=project, name=run_name, config={})
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        assert exists(run_id) and len(metrics) <= 1000 and len(params) <= 100
        if params:
            tell(run_id, "params", values={param.key: param.value for param in params})
        if metrics:
            meet("log")
        for metric in metrics:
            tell(run_id, "log", step=metric.step, values={metric.key: metric.value})

    def update_run(self, run_id, status=None, name=None):
        assert exists(run_id) and status == "RUNNING"
        tell(run_id, "begin", status=status)

    def set_terminated(self, run_id, status=None, end_time=None):
        meet("finish")
        tell(run_id, "end", failed=status == "FAILED")
"""
TRACKIO = """
def init(
    project, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None, config=None,
    resume="never", settings=None, private=None, embed=True, auto_log_gpu=None, gpu_log_interval=10.0,
    auto_log_cpu=None, cpu_log_interval=10.0, webhook_url=None, webhook_min_level=None,
):
    meet("init")
    assert resume == "allow" or not exists(name)
    tell(name, "begin", project=project, name=name, config=config)
    return Run(name)


class Run:
    def __init__(self, name):
        self.name = name

    def log(self, metrics, step=None):
        meet("log")
        tell(self.name, "log", step=step, values=metrics)

    def finish(self):
        meet("finish")
        tell(self.name, "end", failed=False)
"""
SOURCES = {"wandb": WANDB, "mlflow": MLFLOW, "trackio": TRACKIO}


@dataclasses.dataclass
class Kept:
    """What a stand-in keeps of a run.

    Attributes:
        begins: what it was told when the run was begun, and each time it was gone on with.
        points: `[(step, value), ...]` by metric, in the order of their arrival.
        ends: whether it failed, each time it was ended.
        params: the parameters of MLflow.
    """

    begins: list = dataclasses.field(default_factory=list)
    points: dict = dataclasses.field(default_factory=dict)
    ends: list = dataclasses.field(default_factory=list)
    params: dict = dataclasses.field(default_factory=dict)

    def steps(self, metric) -> list[int]:
        """Returns the steps of a metric in the order of their arrival."""
        return [step for step, _ in self.points[metric]]


def write_packages(folder: Path) -> None:
    """Writes the packages into a folder."""
    for name, source in SOURCES.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(COMMON + source)


def read_runs(store: Path, tracker: str) -> dict[str, Kept]:
    """Returns what a stand-in was told, by the identifier of the run."""
    runs = {}
    for path in store.glob(f"{tracker}-*.jsonl"):
        run = runs[path.stem.removeprefix(f"{tracker}-")] = Kept()
        for line in map(json.loads, path.read_text().splitlines()):
            if line["event"] == "log":
                for name, value in line["values"].items():
                    run.points.setdefault(name, []).append((line["step"], value))
            elif line["event"] == "end":
                run.ends.append(line["failed"])
            elif line["event"] == "params":
                run.params |= line["values"]
            else:
                run.begins.append(line)
    return runs
