"""Serves a page on which a trained model can be tried: captions find images, images find captions (docs/serving.md).

    python eval.py serve --workdir=DIR [--index=INDEX] [--captions=FILE.txt] [--port=8000] [--host=127.0.0.1]
    python eval.py serve --workdir=A,B [--index=I,J]

Without an index, the images are those of a split of the run's own data. Two runs answer the same query side by side.
Ctrl-C ends the server.
"""

import ipaddress
import time

from absl import flags

from mefn_jax.config import require_local
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.run import (
    Gallery,
    TrainedRun,
    define_checkpoint_flags,
    define_gallery_flags,
    gallery_from_flags,
    runs_from_flags,
)
from mefn_jax.retrieval.index import check_index_exists
from mefn_jax.runtime.cli import define_path_flag
from mefn_jax.runtime.compile_cache import keep_compiled_programs
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.storage import expand_home
from mefn_jax.serving.http_server import PageServer
from mefn_jax.serving.page_api import PageApi
from mefn_jax.serving.served_model import ServedModel, load_served_model, warm_up
from mefn_jax.serving.worker import Worker

MOST_MODELS = 2


def serve(runs: list[TrainedRun], indexes: list[str], gallery: Gallery, captions: str, host: str, port: int) -> None:
    """Serves one or two runs until it is interrupted. `indexes` has an index for each run, or is empty. Raises
    ConfigError, DataError and CheckpointError before anything is served."""
    check_places(runs, indexes, captions)
    check_host(host)
    server = open_server(host, port)  # before the model is loaded, so that a port that is taken is told at once
    worker = None
    try:
        start = time.perf_counter()
        indexes = indexes or [""] * len(runs)
        models = [load_served_model(run, index, gallery, captions) for run, index in zip(runs, indexes, strict=True)]
        for model in models:
            warm_up(model)
            print0(describe_start(model))
        worker = Worker()
        api = PageApi(models, worker)
        server.begin(api.answer, api.max_bytes)
        print0(f"loaded in {time.perf_counter() - start:.1f} s; open {server.url} in a browser; Ctrl-C ends it")
        server.serve_forever(poll_interval=0.1)
    finally:
        server.close()
        if worker is not None:
            worker.close()


def describe_start(model: ServedModel) -> str:
    """Returns a line about a model that is ready."""
    lines = f", {len(model.lines)} captions to rank" if model.lines else ""
    return f"{model.name}, step {model.step}: {model.images.number} images of {model.images.source}{lines}"


def check_places(runs: list[TrainedRun], indexes: list[str], captions: str) -> None:
    """Raises ConfigError unless there are one or two runs, with an index for each or none, and all exist."""
    if not 1 <= len(runs) <= MOST_MODELS:
        raise ConfigError(f"--workdir names {len(runs)} runs; give one, or two with a comma between them")
    if indexes and len(indexes) != len(runs):
        raise ConfigError(f"--index names {len(indexes)} indexes for {len(runs)} runs; give one for each, or none")
    for index in indexes:
        require_local("--index", index)
        check_index_exists(index)
    require_local("--captions", captions)


def check_host(host: str) -> None:
    """Raises ConfigError for a host that is no address of this machine."""
    try:
        is_address = host == "localhost" or bool(ipaddress.ip_address(host))
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(f"--host={host}: give an address of this machine, such as 127.0.0.1; 0.0.0.0 stands for all")


def open_server(host: str, port: int) -> PageServer:
    """Returns a server that holds a port. Raises ConfigError if the port or the address cannot be used."""
    try:
        return PageServer(host, port)
    except OSError as e:
        raise ConfigError(f"--port={port}: cannot be used at {host} ({e.strerror}); choose another port") from None


def define_flags() -> None:
    """Defines the flags of the command."""
    define_path_flag("workdir", "runs/shapes", "Training run or exported model; or two, separated by a comma: A,B.")
    define_checkpoint_flags()
    define_path_flag("index", None, "Directory of an index, one for each run; default: the images of --split.")
    define_path_flag("captions", "", "A text file of captions, ranked for an image; default: those of --split.")
    define_gallery_flags(with_folds=False)
    flags.DEFINE_integer("port", 8000, "Port to listen on; 0 takes a free one.", lower_bound=0, upper_bound=65535)
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; by default, only this machine can connect.")


def main() -> None:
    """Runs the command."""
    f = flags.FLAGS
    keep_compiled_programs()
    indexes = [expand_home(path) for path in f.index.split(",")] if f.index else []
    serve(runs_from_flags(), indexes, gallery_from_flags(), f.captions, f.host, f.port)
