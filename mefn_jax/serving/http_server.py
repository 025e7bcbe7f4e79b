"""The server: accepts connections within limits, ends slow ones, and writes the log.

It is the standard library's, which needs no package: a thread for each of a few connections is no burden, and the time
limit covers all of a request, which uvicorn cannot do for the lines before the body. A request can only name an address
of a fixed table (`page_api.py`), never a file.
"""

import contextlib
import http.server
import ipaddress
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable

from mefn_jax.errors import reason
from mefn_jax.runtime.console import print0, printable
from mefn_jax.serving import limits
from mefn_jax.serving.limits import Deadlines, RateLimiter, shut_down
from mefn_jax.serving.messages import ClientGoneError, RequestError
from mefn_jax.serving.request_handler import RequestHandler

LOG_WIDTH = 300  # characters of a line of the log
QUIET_SECONDS = 1.0  # between lines of the log about too many requests


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
            super().__init__((host, port), RequestHandler, bind_and_activate=False)
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
        """Notes an error of a connection in one line; a client that disconnects is no error."""
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
