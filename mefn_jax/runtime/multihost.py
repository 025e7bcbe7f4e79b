"""Several processes that train as one: joining them, and checking that all run the same before the first step."""

import contextlib
import gc
import json
import os
import re
import sys
import threading
import traceback
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.experimental import multihost_utils

from mefn_jax.errors import ConfigError, OtherProcessError, UserError, reason
from mefn_jax.runtime.compile_cache import keep_compiled_programs
from mefn_jax.runtime.storage import write_atomic

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
LARGEST_PORT = 2**16 - 1


def initialize() -> None:
    """Lets JAX keep compiled programs, and joins the other processes of the run, as the flags, a TPU slice of several
    hosts, or Slurm describe them. Call it before any other function of JAX. Raises ConfigError if the processes cannot
    be joined; exits with a message if the others do not come in time."""
    keep_compiled_programs()
    gc.freeze()  # the garbage collector then skips what the imports made: tracing takes 5 % less time
    f = flags.FLAGS
    options = {}
    if not f.coordinator_address and (f.num_processes or f.process_id >= 0):
        raise ConfigError(
            "--num_processes and --process_id need --coordinator_address=HOST:PORT, the address of process 0"
        )
    if f.coordinator_address:
        if f.num_processes < 1 or not 0 <= f.process_id < f.num_processes:
            raise ConfigError(
                f"--coordinator_address={f.coordinator_address} needs --num_processes=N and --process_id=0 to N - 1, "
                f"but they are {f.num_processes} and {f.process_id}"
            )
        address = re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):([0-9]{1,5})", f.coordinator_address)
        if not address or not 0 < int(address[2]) <= LARGEST_PORT:
            raise ConfigError(f"--coordinator_address={f.coordinator_address}: give HOST:PORT, such as 10.0.0.1:1234")
        options = {
            "coordinator_address": f.coordinator_address,
            "num_processes": f.num_processes,
            "process_id": f.process_id,
        }
    elif not (count_slurm_tasks() > 1 or count_tpu_hosts() > 1):
        return
    if f.coordinator_address or has_one_task_per_node():
        options["local_device_ids"] = []  # all; JAX's default assumes one task for each GPU
    # At its own timeout, JAX aborts the process with a C++ trace; this timer ends it before that with a clear message.
    watchdog = threading.Timer(f.join_timeout, _give_up, [f.join_timeout])
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(initialization_timeout=f.join_timeout + 60, **options)
    except Exception as e:  # the runtime and the cluster's environment raise many types
        raise ConfigError(f"the processes cannot be joined: {reason(e)}") from None
    finally:
        watchdog.cancel()
    if jax.default_backend() == "cpu":
        # With programs from the compilation cache, processes hung or ended with gloo's "distributed collective
        # mismatch"; without the cache, none did. The likely cause, not verified in XLA: cached programs do not keep
        # their collectives in order.
        jax.config.update("jax_enable_compilation_cache", False)


def _give_up(seconds: int) -> None:
    """Prints that the other processes are missing, and exits."""
    print(
        f"error: timed out after {seconds} s waiting for the other processes. Run the same command on all hosts (Cloud "
        "TPU: gcloud compute tpus tpu-vm ssh NAME --worker=all --command=...), or give a longer --join_timeout",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # the main thread waits inside C++, where no exception reaches it


def count_slurm_tasks() -> int:
    """Returns the number of tasks of this Slurm step if srun started this process, else 1."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) if "SLURM_PROCID" in os.environ else 1


def has_one_task_per_node() -> bool:
    """Returns whether this Slurm step has exactly one task on each of its nodes, such as "1(x4)"."""
    return set(re.findall(r"(\d+)(?:\(|,|$)", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))) == {"1"}


def count_tpu_hosts() -> int:
    """Returns the number of hosts of this TPU slice, or of all slices of the job; 1 without TPUs."""
    if int(os.environ.get("MEGASCALE_NUM_SLICES", "1")) > 1:
        return 2  # at least
    if "TPU_WORKER_HOSTNAMES" in os.environ:  # GKE
        return len(os.environ["TPU_WORKER_HOSTNAMES"].split(","))
    if not (list(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists()):
        return 1
    try:
        request = urllib.request.Request(METADATA, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=2) as answer:
            return len(answer.read().decode().split(","))
    except (urllib.error.URLError, OSError):  # not a Cloud TPU machine
        return 1


def broadcast_text(make: Callable[[], str]) -> str:
    """Returns, on every process, the text that `make()` returns on process 0."""
    text = np.frombuffer((make() if jax.process_index() == 0 else "").encode(), np.uint8)
    if jax.process_count() == 1:
        return text.tobytes().decode()
    length = int(multihost_utils.broadcast_one_to_all(np.int64(len(text))))
    text = np.resize(text, length) if len(text) else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes().decode()


def broadcast_arrays(make: Callable[[], dict], shapes: dict) -> dict:
    """Returns, on every process, the tree of NumPy arrays that `make()` returns on process 0. It has the structure,
    shapes and types of `shapes`. If it fails there, the others raise OtherProcessError."""
    empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    arrays = on_all_processes(lambda: make() if jax.process_index() == 0 else empty)
    arrays = jax.tree.map(lambda x, like: np.asarray(x, like.dtype).reshape(like.shape), arrays, empty)
    return (
        arrays if jax.process_count() == 1 else jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(arrays))
    )


def check_processes_agree(facts: dict[str, str]) -> None:
    """Raises ConfigError on all processes unless `facts` are the same on all of them."""
    if jax.process_count() == 1:
        return
    facts_of_first = json.loads(broadcast_text(lambda: json.dumps(facts)))
    differing = [
        key for key in sorted(facts.keys() | facts_of_first.keys()) if facts.get(key) != facts_of_first.get(key)
    ]
    agrees = np.array(not differing)
    all_agree = np.atleast_1d(multihost_utils.process_allgather(agrees))
    if differing:
        differences = "; ".join(f"{key}: {facts.get(key)} here, {facts_of_first.get(key)} there" for key in differing)
        raise ConfigError(
            f"process {jax.process_index()} differs from process 0 ({differences}); run the same on all hosts"
        )
    if not all_agree.all():
        others = ", ".join(str(k) for k in np.flatnonzero(~all_agree))
        raise ConfigError(f"process {others} does not run the same as process 0; its output says what differs")


def on_all_processes(part):
    """Calls `part()` on every process and returns its result once all have succeeded. If it fails on one process, that
    process raises its own error and the others raise OtherProcessError, instead of waiting for ever."""
    result, error = None, None
    try:
        result = part()
    except Exception as e:
        error = e
    if error is not None and jax.process_count() == 1:
        raise error
    if jax.process_count() > 1:
        failed = np.atleast_1d(multihost_utils.process_allgather(np.array(error is not None)))
        if error is not None:
            raise error
        if failed.any():
            others = ", ".join(str(k) for k in np.flatnonzero(failed))
            raise OtherProcessError(f"process {others} cannot go on; its output says why")
    return result


def check_on_first_process(check: Callable[[], object]) -> None:
    """Calls `check()` on process 0, which alone writes files. If it raises, the others raise OtherProcessError."""
    on_all_processes(lambda: check() if jax.process_index() == 0 else None)


@contextlib.contextmanager
def exit_all_on_error(before_end: Callable[[], None]):
    """With several processes, calls `before_end()` and exits this process if the body raises. The others are blocked in
    a collective, and JAX ends them when this process's heartbeat stops."""
    try:
        yield
    except Exception as e:
        if jax.process_count() == 1:
            raise
        print(f"error: {e}" if isinstance(e, UserError) else traceback.format_exc(), file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            before_end()
        os._exit(1)


def check_workdir_is_shared(workdir: epath.Path) -> None:
    """Raises ConfigError on all processes unless `workdir` is the same directory on all of them."""
    if jax.process_count() == 1:
        return
    token = workdir / f".shared-{broadcast_text(lambda: uuid.uuid4().hex)}"
    first = jax.process_index() == 0

    def check_token():
        if not token.exists():
            raise ConfigError(
                f"--workdir={workdir} on process {jax.process_index()} is not the directory of process 0: give one "
                "that all hosts share, gs://BUCKET/PATH or a network disk"
            )

    on_all_processes(lambda: write_atomic(token, b"") if first else None)
    try:
        on_all_processes(check_token)
    finally:
        if first:
            token.unlink()
