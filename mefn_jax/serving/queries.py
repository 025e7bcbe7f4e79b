"""Queries of the page: their values are checked, they wait for the worker, and their answers are lines of JSON.

The last line is the result or `{"error": text}`. If it takes long, earlier lines report the progress: `{"waiting": n}`,
the number of queries that wait, or `{"done": k, "of": n}`.
"""

import json
import time
from collections.abc import Callable, Iterator

from mefn_jax.errors import TrainingError, UserError, reason
from mefn_jax.runtime.cli import parse_count
from mefn_jax.serving import limits
from mefn_jax.serving.answers import describe_answer, describe_explanation
from mefn_jax.serving.messages import ClientGoneError, PageRequest, RequestError, Response
from mefn_jax.serving.served_model import ServedModel
from mefn_jax.serving.worker import BusyError, CancelledError, Job, Worker

STREAM_SECONDS, LOOK_SECONDS = 0.5, 0.05  # until progress is reported; between checks of the client
DEFAULT_RESULTS = 20


def answer_search(models: list[ServedModel], request: PageRequest) -> Callable:
    """Returns the computation of a search by a caption. Raises RequestError."""
    values = read_json_body(request)
    model, caption = find_model(models, values), check_caption_value(values)
    top_k, names = check_count_value(values), model.images.index.names
    return lambda report: describe_answer(model.search(caption, top_k, report), names)


def answer_lines(models: list[ServedModel], request: PageRequest) -> Callable:
    """Returns the computation of the ranking of lines for an image. Raises RequestError."""
    model, image, values = read_image_request(models, request)
    top_k = check_count_value(values)
    if model.texts is None:
        raise RequestError(404, "there are no captions to rank; start the server with --captions=FILE.txt")
    return lambda report: describe_answer(model.rank_lines(image, top_k, report), model.lines)


def answer_explain(models: list[ServedModel], request: PageRequest) -> Callable:
    """Returns the computation of an explanation. Raises RequestError."""
    model, image, values = read_image_request(models, request)
    caption = check_caption_value(values)
    if model.describe_explanations() == "scores":
        raise RequestError(404, "this model has no attention to explain; it compares pooled embeddings alone")
    return lambda report: describe_explanation(model.explain(image, caption, report))


QUERIES = {"/api/search": answer_search, "/api/lines": answer_lines, "/api/explain": answer_explain}


def read_json_body(request: PageRequest) -> dict:
    """Returns the values of a body of JSON. Raises RequestError."""
    if request.kind != "application/json":
        raise RequestError(415, "send JSON, with the Content-Type application/json")
    try:
        values = json.loads(request.body.decode())
    except (ValueError, RecursionError):
        raise RequestError(400, "the body is not JSON in UTF-8") from None
    if not isinstance(values, dict):
        raise RequestError(400, "the body is no object of JSON")
    return values


def read_image_request(models: list[ServedModel], request: PageRequest) -> tuple[ServedModel, int | bytes, dict]:
    """Returns the model, the image and all values of a query: JSON names one of the images searched by `position`; the
    bytes of an image file come with the values in the address. Raises RequestError."""
    if not request.kind.startswith("image/"):
        values = read_json_body(request)
        model = find_model(models, values)
        return model, find_position(model, values), values
    model = find_model(models, request.query)
    if model.evaluator.config.image.arch == "regions":
        raise RequestError(404, "this model takes precomputed regions, not images")
    return model, request.body, request.query


def find_model(models: list[ServedModel], values: dict) -> ServedModel:
    """Returns the model of a number, `model`, the first by default. Raises RequestError."""
    number = parse_count(str(values.get("model", 0)))
    if number is None or number >= len(models):
        raise RequestError(404, "there is no such model")
    return models[number]


def find_position(model: ServedModel, values: dict) -> int:
    """Returns the `position` of an image that the model searches. Raises RequestError."""
    number, index = parse_count(str(values.get("position"))), model.images.index
    if number is None or number >= len(index.names) or not index.readable[number]:
        raise RequestError(404, "there is no such image")
    return number


def check_caption_value(values: dict) -> str:
    """Returns the `caption`, on one line. Raises RequestError."""
    caption = values.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise RequestError(400, "give a caption, a text")
    if len(caption) > limits.MAX_CAPTION:
        raise RequestError(413, f"the caption has {len(caption)} characters; at most {limits.MAX_CAPTION} are read")
    return " ".join(caption.split())


def check_count_value(values: dict) -> int:
    """Returns `top_k`, how many results are asked for. Raises RequestError."""
    number = parse_count(str(values.get("top_k", DEFAULT_RESULTS)))
    if not number or number > limits.MAX_RESULTS:
        raise RequestError(400, f"top_k: give a number from 1 to {limits.MAX_RESULTS}")
    return number


def run_query(worker: Worker, compute: Callable, request: PageRequest, note: Callable[[str], None]) -> Response:
    """Waits until a query is computed; if that takes long, returns a Response that goes on to wait.

    A client that goes away cancels its query. `note(text)` is told of an error that comes after the first line. Raises
    RequestError, and ClientGoneError.
    """
    start = time.monotonic()
    try:
        job = worker.submit(compute)
    except BusyError:
        raise RequestError(503, "too many queries wait; try again") from None
    while not job.finished.wait(LOOK_SECONDS):
        if request.is_gone():
            job.cancel()
            raise ClientGoneError
        if time.monotonic() - start > STREAM_SECONDS:
            return Response(_stream(worker, job, request, start, note), "application/x-ndjson")
    status, line = _finish(job)
    if status != 200:
        raise RequestError(status, line["error"])
    return Response(encode_line(line), "application/x-ndjson")


def _stream(worker: Worker, job: Job, request: PageRequest, start: float, note) -> Iterator[bytes]:
    """Yields lines about the progress whenever it changes, and the last line."""
    last = None
    try:
        while not job.finished.wait(LOOK_SECONDS):
            done, total = job.progress
            state = {"done": done, "of": total} if job.started.is_set() else {"waiting": worker.waiting}
            if state != last:
                yield encode_line(state)
            last = state
            if request.is_gone():
                raise ClientGoneError
            if time.monotonic() - start > limits.QUERY_SECONDS:
                job.cancel()
        status, line = _finish(job)
        if status != 200:
            note(f"{status} {line['error']}")
        yield encode_line(line)
    finally:
        job.cancel()


def _finish(job: Job) -> tuple[int, dict]:
    """Returns the status and the last line of a query."""
    if job.error is None:
        return 200, job.result
    if isinstance(job.error, CancelledError):
        return 503, {"error": "the query took too long and was ended"}
    if isinstance(job.error, UserError) and not isinstance(job.error, TrainingError):
        return 400, {"error": str(job.error)}
    return 500, {"error": f"internal error ({reason(job.error)})"}


def encode_line(value) -> bytes:
    """Returns a line of JSON."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"
