"""The server: reads requests within limits, and writes answers and errors.

The standard library's: it needs no package, a thread for each of a few connections is no burden, and the time limit
covers all of a request, which uvicorn cannot do for the lines before the body. A request can only name an address of a
fixed table (`page_api.py`), never a file.
"""

import contextlib
import dataclasses
import http.server
import ipaddress
import json
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

from mefn_jax.errors import reason
from mefn_jax.runtime.console import print0, printable
from mefn_jax.serving import limits
from mefn_jax.serving.limits import Deadlines, RateLimiter, shut_down

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
LOG_WIDTH = 300  # characters of a line of the log
QUIET_SECONDS = 1.0  # between lines of the log about too many requests


class ClientGoneError(Exception):
    """Error that ends the answer to a client that has closed the connection."""


class RequestError(Exception):
    """Error that is answered with a status and a message in one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Request:
    """A request: its address without the query, the query's values by name, its body, and its kind (`Content-Type`).

    `is_gone()` returns whether the client has closed the connection.
    """

    method: str
    path: str
    query: dict[str, str]
    body: bytes
    kind: str
    is_gone: Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Response:
    """An answer: a body, or an iterable of parts, which are sent as they come; `keep` lets a browser keep it."""

    body: bytes | Iterable[bytes]
    kind: str = "application/json"
    keep: bool = False


class PageServer(http.server.ThreadingHTTPServer):
    """Holds an address, and from `begin` on gives requests to a function. Raises OSError if the port is taken."""

    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self, host: str, port: int):
        self.limiter, self.hosts = RateLimiter(), _own_hosts(host)
        self.deadlines, self.receive_seconds = Deadlines(), limits.RECEIVE_SECONDS
        self._free, self._uploads = (
            threading.BoundedSemaphore(n) for n in (limits.MAX_CONNECTIONS, limits.MAX_UPLOADS)
        )
        self._last_noted, self._connections, self._lock = 0.0, set(), threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _RequestHandler, bind_and_activate=False)
            self.server_bind()
        except BaseException:
            self.deadlines.close()
            raise
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_port}/"

    def begin(self, answer: Callable, max_bytes: Callable) -> None:
        """Lets requests in. `answer(request)` returns a Response, or raises RequestError or ClientGoneError;
        `max_bytes(path)` returns how large a body an address takes, None if it takes none."""
        self.answer, self.max_bytes = answer, max_bytes
        self.server_activate()

    def server_bind(self):
        """Binds the socket, without the look-up of a name that the base class makes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request, client_address):
        """Starts a thread for a connection, or refuses it if there are too many."""
        if not self._free.acquire(blocking=False):
            self.note("503", client_address[0], "too many connections")
            with contextlib.suppress(OSError):
                request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        """Serves a connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.deadlines.set(request, None)
            with self._lock:
                self._connections.discard(request)
            self._free.release()

    def handle_error(self, request, client_address):
        """Notes an error of a connection in one line; a client that goes away is none."""
        error = sys.exception()
        if not isinstance(error, OSError | ClientGoneError):
            self.note("500", client_address[0], reason(error))

    def hold_upload(self):
        """Returns a context in which one of few large bodies is held. Raises RequestError if there are too many."""
        if not self._uploads.acquire(blocking=False):
            raise RequestError(503, "other images are being read; try again")
        stack = contextlib.ExitStack()
        stack.callback(self._uploads.release)
        return stack

    def note(self, status: str, client: str, text: str) -> None:
        """Writes a line into the log. Of requests that are too many, at most one a QUIET_SECONDS is noted."""
        if status in ("429", "503"):
            if time.monotonic() - self._last_noted < QUIET_SECONDS:
                return
            self._last_noted = time.monotonic()
        print0(printable(f"{client} {status} {text}")[:LOG_WIDTH])

    def close(self) -> None:
        """Closes the socket and all connections."""
        self.server_close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            shut_down(connection)
        self.deadlines.close()


def _own_hosts(host: str) -> set[str] | None:
    """Returns the names by which a server on this machine alone is called; None if it listens to others.

    A page of another name that leads here, which a hostile name server can bring about, gets no answer.
    """
    if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        return None
    return {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host}


class _RequestHandler(http.server.BaseHTTPRequestHandler):
    """Reads the requests of one connection."""

    protocol_version, server_version, sys_version = "HTTP/1.1", "mefn-jax", ""
    disable_nagle_algorithm, wbufsize = True, 1 << 16  # so that a short answer is one packet

    def handle_one_request(self):
        """Reads a request and answers it."""
        self.server.deadlines.set(self.connection, self.server.receive_seconds)
        super().handle_one_request()

    def do_GET(self):  # noqa: N802
        """Answers GET."""
        self._handle()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _handle(self) -> None:
        try:
            request, held = self._read_request()
            with held:
                self.server.deadlines.set(self.connection, None)
                self._send(self.server.answer(request))
        except RequestError as e:
            self.send_error(e.status, str(e))
        except (OSError, ClientGoneError):
            raise  # the connection ends
        except Exception as e:  # a mistake in the code is no reason to end
            self.send_error(500, f"internal error ({reason(e)})")

    def _read_request(self):
        """Returns the Request, and the context that holds its body. Raises RequestError."""
        if not self.server.limiter.allow(self.client_address[0]):
            raise RequestError(429, "too many requests; wait a second")
        self._check_host()
        try:
            parts = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(parts.query, max_num_fields=10).items()}
        except ValueError:  # too many values, or no address at all
            raise RequestError(400, "the address cannot be read") from None
        if not self.path.startswith("/"):
            raise RequestError(400, "the address does not begin with a slash")
        length, held = self._check_length(parts.path), contextlib.nullcontext()
        if length > limits.MAX_JSON_BYTES:
            held = self.server.hold_upload()
        body = self.rfile.read(length) if length else b""
        if len(body) < length:
            self.close_connection = True
            raise RequestError(408, "the body did not come to its end in time")
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else ""
        return Request(self.command, parts.path, query, body, kind, self._is_gone), held

    def _check_host(self) -> None:
        """Raises RequestError unless the request is meant for this server, and not sent by a page of another one."""
        host = self.headers.get("Host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.server.hosts is not None and name not in self.server.hosts:
            raise RequestError(403, "the name of the host is not this server's")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise RequestError(403, "the request comes from a page of another server")

    def _check_length(self, path: str) -> int:
        """Returns the length of the body. Raises RequestError, after which the connection is closed, as the body is
        not read."""
        limit, texts = self.server.max_bytes(path), self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers:
            raise RequestError(411, "give the length of the body")
        if self.command != "POST":
            if texts and texts != ["0"]:
                raise RequestError(400, "a request of this kind has no body")
            return 0
        if limit is None:
            raise RequestError(405 if path == "/" else 404, "nothing can be sent to this address")
        if len(texts) != 1 or not texts[0].isascii() or not texts[0].isdigit() or len(texts[0]) > 12:
            raise RequestError(411, "give the length of the body")
        if int(texts[0]) > limit:
            raise RequestError(413, f"the body has {texts[0]} bytes; at most {limit} are read")
        return int(texts[0])

    def _is_gone(self) -> bool:
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _send(self, response: Response, status: int = 200) -> None:
        is_whole = isinstance(response.body, bytes)
        parts = [response.body] if is_whole else response.body
        self.close_connection |= not is_whole
        self.send_response_only(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "private, max-age=86400, immutable" if response.keep else "no-store")
        self.send_header("Content-Type", response.kind)
        if is_whole:
            self.send_header("Content-Length", str(len(response.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.server.deadlines.set(self.connection, limits.SEND_SECONDS)
        self.end_headers()
        for part in parts if self.command != "HEAD" else ():
            self.server.deadlines.set(self.connection, limits.SEND_SECONDS)
            self.wfile.write(part)
            self.wfile.flush()

    def send_error(self, code, message=None, explain=None):
        """Answers with an error as JSON, notes it in one line, and closes the connection."""
        message = message or HTTPStatus(code).phrase
        request = f"{self.command or ''} {getattr(self, 'path', '')}"[:100]
        self.server.note(str(int(code)), self.client_address[0], f"{request}: {message}")
        self.close_connection, self.request_version = True, self.protocol_version
        with contextlib.suppress(OSError):
            self._send(Response(json.dumps({"error": printable(message)}).encode() + b"\n"), int(code))
            self._drain()

    def _drain(self) -> None:
        """Reads what a client still sends, for a moment: closed at once, it might not see the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(0.2)
        left = 1 << 20
        while left > 0 and (data := self.connection.recv(1 << 16)):
            left -= len(data)

    def log_message(self, format, *args):
        """Notes nothing: only requests that fail are noted, by `send_error`."""
