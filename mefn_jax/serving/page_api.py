"""Answers requests for a fixed table of addresses, those that the page uses. No address names a file."""

import secrets
import threading
from importlib import resources

from mefn_jax.data.images import resize_from_config
from mefn_jax.errors import UserError
from mefn_jax.runtime.console import print0
from mefn_jax.serving import limits
from mefn_jax.serving.answers import describe_model
from mefn_jax.serving.messages import PageRequest, RequestError, Response
from mefn_jax.serving.pictures import make_thumbnail
from mefn_jax.serving.queries import QUERIES, encode_line, find_model, find_position, run_query
from mefn_jax.serving.served_model import ServedModel
from mefn_jax.serving.worker import Worker

# The parts of the page: the package that has the file, in its folder `pages`, and the kind of the file.
PAGE_FILES = {
    "/": ("mefn_jax.serving", "page.html", "text/html; charset=utf-8"),
    "/style.css": ("mefn_jax.reports", "style.css", "text/css; charset=utf-8"),
    "/page.css": ("mefn_jax.serving", "page.css", "text/css; charset=utf-8"),
    "/page.js": ("mefn_jax.serving", "page.js", "text/javascript; charset=utf-8"),
    "/pair.js": ("mefn_jax.serving", "pair.js", "text/javascript; charset=utf-8"),
    "/regions.js": ("mefn_jax.serving", "regions.js", "text/javascript; charset=utf-8"),
    "/requests.js": ("mefn_jax.serving", "requests.js", "text/javascript; charset=utf-8"),
    "/favicon.ico": ("mefn_jax.serving", "icon.svg", "image/svg+xml"),
}


class PageApi:
    """Answers the requests of the page.

    Attributes:
        models: the models, one or two.
        worker: computes their queries.
    """

    def __init__(self, models: list[ServedModel], worker: Worker):
        self.models, self.worker = models, worker
        version = secrets.token_hex(4)  # in the addresses of pictures, which a browser keeps
        bounds = {"caption": limits.MAX_CAPTION, "image": limits.MAX_IMAGE_BYTES, "results": limits.MAX_RESULTS}
        setup = {"version": version, "limits": bounds, "models": [describe_model(model) for model in models]}
        self._fixed = {path: Response(read_page_file(*file[:2]), file[2]) for path, file in PAGE_FILES.items()}
        self._fixed["/api/setup"] = Response(encode_line(setup))
        self._decoders = threading.BoundedSemaphore(limits.MAX_DECODED)

    def max_bytes(self, path: str) -> int | None:
        """Returns the largest body that an address takes; None if it takes none."""
        if path not in QUERIES:
            return None
        return limits.MAX_JSON_BYTES if path == "/api/search" else limits.MAX_IMAGE_BYTES

    def answer(self, request: PageRequest) -> Response:
        """Answers a request. Raises RequestError, and ClientGoneError if nobody waits for the answer any longer."""
        if request.path in QUERIES:
            if request.method != "POST":
                raise RequestError(405, "a query is sent by POST")
            compute = QUERIES[request.path](self.models, request)
            return run_query(self.worker, compute, request, lambda text: print0(f"{request.path}: {text}"))
        if request.path in self._fixed:
            return self._fixed[request.path]
        if request.path == "/image":
            return self._make_picture(request)
        raise RequestError(404, "there is nothing at this address")

    def _make_picture(self, request: PageRequest) -> Response:
        """Returns the picture of an image searched. Raises RequestError."""
        model = find_model(self.models, request.query)
        position = find_position(model, request.query)
        if model.images.read is None:
            raise RequestError(404, "there are no photographs, only precomputed regions")
        resize, name = resize_from_config(model.evaluator.config.image), model.images.index.names[position]
        if not self._decoders.acquire(timeout=limits.SEND_SECONDS):
            raise RequestError(503, "other pictures are being made; try again")
        try:
            return Response(make_thumbnail(model.images.read(position), resize, name), "image/jpeg", keep=True)
        except UserError as e:
            raise RequestError(404, str(e)) from None
        finally:
            self._decoders.release()


def read_page_file(package: str, name: str) -> bytes:
    """Returns a file of the page."""
    return resources.files(package).joinpath("pages", name).read_bytes()
