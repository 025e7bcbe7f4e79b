"""The server alone, with an answer that needs no model: slow clients, many of them, and requests from other pages."""

import contextlib
import json
import socket
import threading
import time

import pytest

from mefn_jax.serving import limits, messages
from mefn_jax.serving.http_server import PageServer
from mefn_jax.serving.limits import RateLimiter
from mefn_jax.serving.messages import PageRequest, Response


def answer(request: PageRequest) -> Response:
    if request.path == "/wrong":
        raise ValueError("a mistake\nof two lines")
    if request.path == "/parts":
        return Response(b"one\n" for _ in range(3))
    return Response(json.dumps([request.method, request.path, request.query, len(request.body)]).encode())


@pytest.fixture
def server():
    """A running server whose requests must arrive within half a second."""
    started = PageServer("127.0.0.1", 0)
    started.receive_seconds = 0.5
    started.begin(answer, lambda path: 5_000_000 if path == "/post" else None)
    thread = threading.Thread(target=started.serve_forever, args=(0.02,))
    thread.start()
    yield started
    started.shutdown()
    thread.join()
    started.close()
    assert not [t.name for t in threading.enumerate() if t.name == "deadlines"]


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=10)


def exchange(server, data: bytes) -> bytes:
    """Sends bytes and returns everything that comes back until the server closes the connection."""
    with connect(server) as connection:
        connection.sendall(data)
        return read_all(connection)


def read_all(connection) -> bytes:
    parts = []
    while data := connection.recv(1 << 16):
        parts.append(data)
    return b"".join(parts)


GET = b"GET /a?b=1&b=2 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def test_answers_within_its_policy(server):
    head, body = exchange(server, GET).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert json.loads(body) == ["GET", "/a", {"b": "2"}, 0]
    for name, value in messages.HEADERS.items():
        assert f"{name}: {value}".encode() in head
    assert b"script-src 'self'" in head
    assert b"Python" not in head
    assert exchange(server, GET.replace(b"GET", b"HEAD")).endswith(b"\r\n\r\n")


def test_connection_is_kept_for_the_next_request(server):
    with connect(server) as connection:
        for _ in range(3):
            connection.sendall(GET.replace(b"Connection: close\r\n", b""))
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")


def test_parts_are_sent_as_they_come(server):
    assert exchange(server, GET.replace(b"/a", b"/parts")).endswith(b"\r\n\r\none\none\none\n")


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ",
        b"POST /post HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nab",
    ],
    ids=["nothing", "a part of the line", "a part of the head", "a part of the body"],
)
def test_client_that_sends_a_byte_now_and_then_is_ended(begin, server):
    with connect(server) as connection:
        connection.sendall(begin)
        start = time.monotonic()
        stop = threading.Event()

        def drip():
            while not stop.wait(0.05):
                try:
                    connection.sendall(b"x" if begin else b"\r")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        assert exchange(server, GET).startswith(b"HTTP/1.1 200")  # another client is answered meanwhile
        with contextlib.suppress(ConnectionResetError):
            read_all(connection)
        assert time.monotonic() - start < 3
        stop.set()
        thread.join()


def test_refuses_connections_beyond_the_limit(server, monkeypatch, capsys):
    held = [connect(server) for _ in range(limits.MAX_CONNECTIONS)]
    end = time.monotonic() + 5
    while server._free._value and time.monotonic() < end:
        time.sleep(0.01)
    assert exchange(server, b"").startswith(b"HTTP/1.1 503")
    for connection in held:
        connection.close()
    end = time.monotonic() + 5
    while server._free._value < limits.MAX_CONNECTIONS and time.monotonic() < end:
        time.sleep(0.01)
    assert exchange(server, GET).startswith(b"HTTP/1.1 200")
    assert "503 too many connections" in capsys.readouterr().out


def test_refuses_requests_beyond_the_rate(server, capsys):
    server.limiter = RateLimiter(per_second=0.001, burst=3)
    statuses = [exchange(server, GET)[9:12] for _ in range(6)]
    assert statuses == [b"200"] * 3 + [b"429"] * 3
    assert capsys.readouterr().out.count("too many requests") == 1  # and not a line for each


def test_rate_limiter_fills_up_again_and_forgets_old_clients():
    limiter = RateLimiter(per_second=2, burst=4)
    assert [limiter.allow("a", 0.0) for _ in range(5)] == [True] * 4 + [False]
    assert [limiter.allow("a", 1.0) for _ in range(3)] == [True, True, False]
    assert limiter.allow("b", 1.0)
    for k in range(2 * limits.MAX_CLIENTS):
        limiter.allow(str(k), 1.0)
    assert len(limiter._buckets) == limits.MAX_CLIENTS


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n", 403),
        (b"GET / HTTP/1.1\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: localhost.evil.example:80\r\n", 403),
        (b"POST /post HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\nContent-Length: 0\r\n", 403),
        (b"POST /post HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\nContent-Length: 0\r\n", 403),
        (b"POST /post HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nContent-Length: 0\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: [::1]:8000\r\n", 200),
        (b"POST /post HTTP/1.1\r\nHost: localhost\r\n", 411),
        (b"POST /post HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000001\r\n", 413),
        (b"POST /post HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n", 411),
        (b"POST /post HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n", 411),
        (b"POST /post HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n", 411),
        (b"POST /other HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n", 404),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n", 400),
        (b"DELETE / HTTP/1.1\r\nHost: localhost\r\n", 501),
        (b"GET /wrong HTTP/1.1\r\nHost: localhost\r\n", 500),
        (b"GET / HTTP/9.9\r\nHost: localhost\r\n", 505),
        (b"GET /?" + b"&".join(b"a%d=1" % k for k in range(20)) + b" HTTP/1.1\r\nHost: localhost\r\n", 400),
    ],
)
def test_request_that_fails_is_an_error_in_json_and_one_line_of_the_log(head, status, server, capsys):
    data = exchange(server, head + b"Connection: close\r\n\r\n")
    assert data.startswith(f"HTTP/1.1 {status}".encode())
    printed = capsys.readouterr()
    assert printed.err == ""
    if status != 200:
        assert json.loads(data.split(b"\r\n\r\n")[1])["error"]
        assert len(printed.out.splitlines()) == 1
        assert f"127.0.0.1 {status} " in printed.out
    else:
        assert printed.out == ""


def test_holds_few_large_bodies_at_once(server):
    head = b"POST /post HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    held = [connect(server) for _ in range(limits.MAX_UPLOADS)]
    for connection in held:
        connection.sendall(head)
    end = time.monotonic() + 5
    while server._uploads._value and time.monotonic() < end:
        time.sleep(0.01)
    assert exchange(server, head).startswith(b"HTTP/1.1 503")
    for connection in held[:2]:
        connection.sendall(bytes(1_000_000))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    for connection in held:  # two of them with half a body
        connection.close()
    end = time.monotonic() + 5
    while server._uploads._value < limits.MAX_UPLOADS and time.monotonic() < end:
        time.sleep(0.01)
    assert exchange(server, head + bytes(1_000_000)[:999_999] + b"x").startswith(b"HTTP/1.1 200")
    assert server._uploads._value == limits.MAX_UPLOADS


def test_port_that_is_taken_is_an_error(server):
    with pytest.raises(OSError, match="in use"):
        PageServer("127.0.0.1", server.server_port)
