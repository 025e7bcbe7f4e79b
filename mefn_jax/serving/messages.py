"""Requests and answers, and the errors that end them."""

import dataclasses
from collections.abc import Callable, Iterable

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


class ClientGoneError(Exception):
    """Error that ends the answer to a client that has closed the connection."""


class RequestError(Exception):
    """Error that is answered with a status and a message in one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class PageRequest:
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
