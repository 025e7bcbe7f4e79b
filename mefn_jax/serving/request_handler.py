"""Reads the requests of one connection within limits, and writes answers and errors."""

import contextlib
import http.server
import json
import socket
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

from mefn_jax.errors import reason
from mefn_jax.runtime.console import printable
from mefn_jax.serving import limits
from mefn_jax.serving.messages import HEADERS, ClientGoneError, PageRequest, RequestError, Response


class RequestHandler(http.server.BaseHTTPRequestHandler):
    """Serves one connection of a `PageServer`."""

    protocol_version, server_version, sys_version = "HTTP/1.1", "mefn-jax", ""
    disable_nagle_algorithm, wbufsize = True, 1 << 16  # so that a short answer is one packet

    def handle_one_request(self):
        """Reads a request and answers it."""
        self.server.deadlines.set(self.connection, self.server.receive_seconds)
        super().handle_one_request()

    def do_GET(self):
        """Answers GET."""
        self._handle()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _handle(self) -> None:
        try:
            with contextlib.ExitStack() as held:
                request = self._read_request(held)
                self.server.deadlines.set(self.connection, None)
                self._send(self.server.answer(request))
        except RequestError as e:
            self.send_error(e.status, str(e))
        except (OSError, ClientGoneError):
            raise  # the connection ends
        except Exception as e:  # an error in the code must not end the server
            self.send_error(500, f"internal error ({reason(e)})")

    def _read_request(self, held: contextlib.ExitStack) -> PageRequest:
        """Returns the request; `held` gives a large body's place back when it is closed. Raises RequestError."""
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
        length = self._check_length(parts.path)
        if length > limits.MAX_JSON_BYTES:
            held.enter_context(self.server.hold_upload())
        body = self.rfile.read(length) if length else b""
        if len(body) < length:
            self.close_connection = True
            raise RequestError(408, "the body did not arrive in time")
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else ""
        return PageRequest(self.command, parts.path, query, body, kind, self._is_gone)

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

    def log_message(self, *args):
        """Notes nothing: only requests that fail are noted, by `send_error`."""
