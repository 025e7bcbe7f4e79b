"""A hundred hostile requests, and an index and captions with markup and with paths that lead out of it: the server goes
on, and nothing outside the index can be read."""

import contextlib
import io
import json
import socket
import threading
import time
import zlib

import numpy as np
import pytest
from chromium import Chromium
from PIL import Image

from mefn_jax.errors import DataError
from mefn_jax.serving.pictures import check_image
from mefn_jax.serving.searched_images import read_inside

MARKUP = "<img src=x onerror=alert(1)>"
NAMES = (f"{MARKUP}.png", "'\"&amp;<script>alert(2)<\\script>.png", "\u202egnp.exe \x07\u2028.png", "plain.png")
CAPTIONS = ("<script>alert(3)</script> a red circle", "</p></main><h1>a blue square", "javascript:alert(4) red")
SECRET = (1, 254, 3)  # the color of the image outside
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, trained, command):
    """A folder with `images`, an `index` of them in which two names lead to `secret.png` outside, and `lines.txt`."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in (*NAMES, "z1.png", "z2.png", "z3.png"):
        Image.fromarray(rng.integers(0, 256, (60, 60, 3), np.uint8)).save(root / "images" / name)
    Image.new("RGB", (60, 60), SECRET).save(root / "secret.png")
    (root / "lines.txt").write_text("\n".join(CAPTIONS))
    command("eval.py", "index", f"--workdir={trained[0]}", f"--images={root / 'images'}", f"--out={root / 'index'}")
    names = json.loads((root / "index" / "images.json").read_text())
    outside = {"z1.png": "../secret.png", "z2.png": str(root / "secret.png"), "z3.png": "../index/index.json"}
    (root / "index" / "images.json").write_text(json.dumps([outside.get(name, name) for name in names]))
    return root


@pytest.fixture(scope="module")
def server(start_server, trained, place):
    words = f"--workdir={trained[0]}", f"--index={place / 'index'}", f"--captions={place / 'lines.txt'}"
    return start_server(*words)


def make_png(width: int, height: int) -> bytes:
    """Returns a small PNG file that claims to have these sides."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")


def raw(line: bytes, *heads: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """Returns a request as it is sent; its length is right unless given."""
    length = len(body) if length is None else length
    lines = [line, b"Host: localhost", b"Connection: close", *heads]
    if line.startswith(b"POST"):
        lines.append(b"Content-Length: %d" % length)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def list_requests() -> list[bytes]:
    """Returns requests of which each must fail, and none may do more."""
    image = io.BytesIO()
    Image.new("RGB", (40, 40)).save(image, "PNG")
    good = image.getvalue()
    paths = [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/index/index.json",
        "/style.css/../../x",
    ]
    paths += ["/page.js%00", "/image/../secret.png", "/image?position=../secret.png", "/image?position=-1", "/image"]
    paths += ["/image?position=99999999999999999999", "/image?position=1e1", "/image?position=%00", "/image?position=7"]
    paths += [
        "/image?model=5&position=0",
        "/image?model=../&position=0",
        "/api",
        "/api/",
        "/api/search",
        "/api/explain",
    ]
    paths += ["/" + "a" * 5000, "/?" + "&".join(f"a{k}=1" for k in range(50)), "/\u00e9".encode().decode("latin1")]
    paths += [
        "http://evil.example/",
        "//[",
        "/image?position=\u00b2".encode().decode("latin1"),
        "/.git/config",
        "/eval.py",
    ]
    requests = [raw(b"GET " + path.encode("latin1") + b" HTTP/1.1") for path in paths]
    for method in (b"PUT", b"DELETE", b"TRACE", b"OPTIONS", b"PATCH", b"CONNECT", b"get", b"\xff\xfe", b"G" * 300):
        requests.append(raw(method + b" / HTTP/1.1"))
    requests += [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\r\n\r\n",
        b"A" * 70_000 + b"\r\n",
    ]
    requests += [raw(b"GET / HTTP/1.1", b"X: " + b"a" * 70_000), raw(b"GET / HTTP/1.1", *[b"X: 1"] * 200)]
    requests += [raw(b"GET / HTTP/1.1", b"Host: evil.example")[:16] + b"Host: evil.example\r\n\r\n"]
    requests += [raw(b"GET / HTTP/1.1", b"Origin: http://evil.example"), raw(b"GET / HTTP/9.9"), raw(b"GET / FTP/1")]

    def post(path, body, kind=b"application/json", **more):
        return raw(b"POST %s HTTP/1.1" % path, b"Content-Type: " + kind, body=body, **more)

    values = [
        None,
        3,
        True,
        [],
        {},
        "",
        "   ",
        "!!!",
        "\u2028",
        "a" * 1001,
        "\ud800",
        "\x00",
        "\u200b",
        {"$ne": 1},
        ["red"],
    ]
    bodies = [json.dumps({"caption": value}).encode() for value in values]
    bodies += [b"", b"{", b"[]", b"null", b"\xff\xfe{", b'{"caption": "red"', b"[" * 16_000, b'{"caption": "\xe9"}']
    bodies += [json.dumps({"caption": "red", "top_k": k}).encode() for k in (0, -1, 101, 1e9, "many", None, [1])]
    bodies += [json.dumps({"caption": "red", "model": k}).encode() for k in (1, -1, "x", None, 0.5, [0], {})]
    requests += [post(b"/api/search", body) for body in bodies]
    requests += [post(b"/api/search", b"{}", b"text/plain"), post(b"/api/search", b"a=1", b"multipart/form-data")]
    requests += [post(b"/api/search", b"x" * 20_000), post(b"/api/search", b"{}", length=10**15)]
    requests += [
        post(b"/api/explain", json.dumps({"caption": "red", "position": k}).encode()) for k in (-1, 1e9, "../x")
    ]
    requests += [post(b"/api/lines", json.dumps({"position": k}).encode()) for k in (None, 10**30, True)]
    broken = [
        b"",
        b"GIF89a",
        good[:60],
        b"\xff\xd8\xff\xe0" + b"\0" * 50,
        b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run\n",
        b"<svg/>",
    ]
    broken += [make_png(100_000, 100_000), make_png(30_000, 30_000), make_png(0, 0), b"BM" + b"\xff" * 60]
    for body in broken:
        requests += [post(b"/api/lines", body, b"image/png"), post(b"/api/explain?caption=red", body, b"image/png")]
    requests += [post(b"/api/explain", good, b"image/png"), post(b"/api/lines?top_k=x", good, b"image/png")]
    requests += [post(b"/api/lines", good, b"text/html"), post(b"/api/lines", b"", b"image/png", length=10**9)]
    requests += [post(b"/", b"x"), post(b"/image", b"x"), post(b"/nothing", b"x" * 1000)]
    return requests


def exchange(server, data: bytes) -> bytes:
    """Sends bytes and returns everything that comes back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        parts = []
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(1 << 16):
                parts.append(data)
        return b"".join(parts)


def test_hostile_requests_fail_in_one_line_each_and_the_server_goes_on(server, place):
    requests = list_requests()
    assert len(requests) > 100
    before = server.query("/api/search", caption="red")
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    for k, connection in enumerate(slow):  # bodies that never come
        connection.sendall(
            [b"GET /", b"POST /api/lines HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"][k % 2]
        )
    lines = len(server.log.read_text().splitlines())
    for number, data in enumerate(requests):
        answer = exchange(server, data)
        assert not answer or b" 200 " not in answer.split(b"\r\n")[0], (number, data[:200], answer[:300])
        if answer:
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), (number, data[:200], answer[:300])
            assert b" 500 " not in head.split(b"\r\n")[0], (number, data[:200], answer[:300])
            assert data.startswith(b"HEAD") or json.loads(body)["error"], (data[:100], answer)
            assert b"root:" not in answer
            assert str(place).encode() not in answer
    assert server.process.poll() is None
    assert server.query("/api/search", caption="red") == before
    printed = server.log.read_text().splitlines()[lines:]
    assert len(printed) <= len(requests)
    assert all(line.startswith("127.0.0.1 ") for line in printed), printed
    assert not any("Traceback" in line for line in printed)
    for connection in slow:
        connection.close()


def test_no_name_leads_out_of_the_index(server, place):
    """Neither by its picture nor by an explanation; other pictures are shown."""
    results = server.query("/api/search", caption="red", top_k=100)["results"]
    outside = [x["position"] for x in results if "secret" in x["name"] or "index.json" in x["name"]]
    assert len(results) == len(NAMES) + 3
    assert len(outside) == 3
    for position in (x["position"] for x in results):
        status, headers, body = server.request("GET", f"/image?position={position}")
        query = json.dumps({"caption": "red", "position": position}).encode()
        explained, _, pair = server.request("POST", "/api/explain", query, JSON)
        if position in outside:
            assert (status, explained) == (404, 400), (body, pair)
            assert "not below the folder" in json.loads(body)["error"]
            assert "not below the folder" in json.loads(pair)["error"]
        else:
            assert (status, headers["Content-Type"], explained) == (200, "image/jpeg", 200)
            with Image.open(io.BytesIO(body)) as picture:
                assert np.abs(np.asarray(picture, float).mean((0, 1)) - SECRET).max() > 50


@pytest.mark.parametrize("name", ["../x.png", "/etc/passwd", "a/../../x", "a\0b", "..", "nothing.png", "."])
def test_read_inside_refuses_names_that_lead_out(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.png").write_bytes(b"secret")
    with pytest.raises(DataError):
        read_inside(tmp_path / "folder", name)


def test_check_image_reads_no_format_that_runs_a_program(tmp_path):
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"not", b"", make_png(40_000, 40_000)):
        with pytest.raises(DataError, match="x: "):
            check_image(data, "x")


def test_markup_in_names_and_captions_is_text_on_the_page(server, tmp_path):
    with Chromium(tmp_path) as browser:
        tab = browser.open(server.url + "#caption=" + CAPTIONS[0].replace(" ", "+").replace("/", "%2F"))
        tab.wait_for("document.querySelectorAll('.result').length == 7")
        assert tab.evaluate("document.querySelector('#answers h2').textContent").endswith(f"“{CAPTIONS[0]}”")
        shown = tab.evaluate("[...document.querySelectorAll('.file')].map((e) => e.textContent)")
        assert set(NAMES) <= set(shown)
        clean = next(k for k, name in enumerate(shown) if name == NAMES[0])
        tab.click(f".found li:nth-child({clean + 1}) .result")
        tab.wait_for("document.querySelector('.matrix')")
        assert tab.evaluate("document.querySelector('.pair h3').textContent") == NAMES[0]
        tab.click(".turn")
        tab.wait_for("document.querySelectorAll('.lines .result').length == 3")
        assert set(tab.evaluate("[...document.querySelectorAll('.lines .text')].map((e) => e.textContent)")) == {
            *CAPTIONS
        }
        assert tab.evaluate("document.querySelectorAll('#answers script, #answers [onerror], h1').length") == 1
        assert not [e for e in list(browser.events.queue) if e["method"] == "Page.javascriptDialogOpening"]


def test_slow_clients_do_not_hold_up_others(server):
    """A client that sends a body byte by byte, while others are answered."""
    stop = threading.Event()

    def drip():
        with socket.create_connection(("127.0.0.1", server.port)) as connection, contextlib.suppress(OSError):
            connection.sendall(b"POST /api/lines HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n")
            connection.sendall(b"Content-Length: 1000\r\n\r\n")
            while not stop.wait(0.02):
                connection.sendall(b"x")

    threads = [threading.Thread(target=drip) for _ in range(10)]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    for _ in range(5):
        server.query("/api/search", caption="blue")
    assert time.monotonic() - start < 5
    stop.set()
    for thread in threads:
        thread.join()
