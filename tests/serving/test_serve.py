"""The server as a process: its answers against the functions that the static commands use, and its end."""

import concurrent.futures
import contextlib
import io
import json
import os
import socket
import time

import numpy as np
import pytest
from commands import refusal
from PIL import Image

import mefn_jax
from mefn_jax.data import from_config
from mefn_jax.reports.explanation import TERM_NAMES, score_terms

IMAGE = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def val(trained):
    """The trained run as a Retriever, and its val split."""
    retriever = mefn_jax.load(trained[0])
    return retriever, from_config.open_dataset(retriever.config).split("val")


def test_search_gives_images_and_scores_of_all_pairs(server, val):
    retriever, split = val
    captions = split.all_captions()
    images = retriever.encode_images([split.record(k)["image"] for k in range(split.num_images)])
    for caption in (captions[0], captions[-1], "red"):
        expected = retriever.score(images, retriever.encode_texts([caption]))[:, 0]
        answer = server.query("/api/search", caption=caption, top_k=7)
        order = np.argsort(-expected, kind="stable")[:7]
        assert [x["position"] for x in answer["results"]] == list(order)
        np.testing.assert_allclose([x["score"] for x in answer["results"]], expected[order], atol=1e-5)
        assert [x["name"] for x in answer["results"]] == [split.record(k)["image_id"] for k in order]
        assert answer["scored"] == split.num_images


def test_explain_gives_terms_of_static_pair(server, val):
    """Of an image that is searched, and of the same one when it is sent."""
    retriever, split = val
    data, caption = split.record(3)["image"], split.all_captions()[0]
    x = retriever.explain(data, caption)
    status, _, sent = server.request("POST", f"/api/explain?caption={caption.replace(' ', '+')}", data, IMAGE)
    assert status == 200, sent
    for answer in (server.query("/api/explain", caption=caption, position=3), json.loads(sent)):
        assert answer["words"] == x.words
        for name in ("attention", "H", "region_weights", "word_weights", "boxes"):
            np.testing.assert_allclose(answer[name], getattr(x, name), atol=2e-6, err_msg=name)
        assert answer["values"] == pytest.approx(x.values, abs=2e-6)
        terms = {TERM_NAMES[name]: pytest.approx(value, abs=2e-6) for name, value in score_terms(x).items()}
        assert {term["name"]: term["value"] for term in answer["terms"]} == terms
        assert sum(term["value"] for term in answer["terms"]) == pytest.approx(x.values["score"], abs=1e-5)
        assert answer["photo"].startswith("data:image/jpeg;base64,")


def test_lines_ranks_captions_of_split_for_image(server, val):
    retriever, split = val
    texts = list(dict.fromkeys(split.all_captions()))
    data = split.record(2)["image"]
    scores = retriever.score(retriever.encode_images([data]), retriever.encode_texts(texts))[0]
    order = np.argsort(-scores, kind="stable")[:5]
    status, _, sent = server.request("POST", "/api/lines?top_k=5", data, IMAGE)
    assert status == 200, sent
    for answer in (server.query("/api/lines", position=2, top_k=5), json.loads(sent)):
        assert [x["name"] for x in answer["results"]] == [texts[k] for k in order]
        np.testing.assert_allclose([x["score"] for x in answer["results"]], scores[order], atol=1e-5)


def test_picture_is_image_as_model_sees_it(server, val):
    status, headers, body = server.request("GET", "/image?position=4")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    with Image.open(io.BytesIO(body)) as picture, Image.open(io.BytesIO(val[1].record(4)["image"])) as image:
        assert picture.size == (176, 176)
        difference = np.asarray(picture, float) - np.asarray(image.convert("RGB").resize((176, 176), 3), float)
    assert np.abs(difference).mean() < 8  # JPEG, and noise in the drawn scenes


def test_setup_describes_model_and_limits(server, trained, val):
    setup = json.loads(server.request("GET", "/api/setup")[2])
    (model,) = setup["models"]
    assert (model["name"], model["system"], model["explains"]) == (str(trained[0]), "mefn", "entropies")
    assert (model["images"], model["source"]) == (val[1].num_images, "split val")
    assert set(model["examples"]) <= set(val[1].all_captions())
    assert len(model["examples"]) == 3


def test_notes_tell_of_captions_that_are_read_badly(server):
    long = server.query("/api/search", caption="red " * 40)
    assert long["notes"] == ["The caption has 40 wordpieces, but the model reads only the first 16."]


def test_no_query_compiles_anything(server, val):
    """Of whatever length, even the first; of images that are searched or sent. The start compiles all programs."""
    start = server.log.read_text().split("loaded in")[0]
    assert start.count("Compiling") > 5
    data = val[1].record(1)["image"]
    for caption in ("red", "a red circle and a blue square", "green " * 30):
        server.query("/api/search", caption=caption, top_k=len(caption) % 7 + 1)
        server.query("/api/explain", caption=caption, position=1)
        server.request("POST", f"/api/explain?caption={caption.replace(' ', '+')}", data, IMAGE)
    server.query("/api/lines", position=1, top_k=3)
    server.request("POST", "/api/lines", data, IMAGE)
    assert "Compiling" not in server.log.read_text().split("loaded in")[1]


def test_50_queries_at_once_are_answered_like_one(server, val):
    captions = (val[1].all_captions() * 50)[:50]
    expected = {caption: server.query("/api/search", caption=caption) for caption in set(captions)}
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda caption: server.query("/api/search", caption=caption), captions))
    assert answers == [expected[caption] for caption in captions]


def test_client_that_goes_away_cancels_its_query(server, val):
    """Many queries of clients that do not wait do not delay the next one, and leave no connection behind."""
    body = json.dumps({"caption": val[1].all_captions()[0]}).encode()
    request = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request += b"Content-Length: %d\r\n\r\n" % len(body) + body
    for _ in range(40):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request)
    start = time.monotonic()
    server.query("/api/search", caption="red")
    assert time.monotonic() - start < 5
    end = time.monotonic() + 5
    while count_sockets(server) > 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert count_sockets(server) == 1  # the one that listens


def count_sockets(server) -> int:
    """Returns how many sockets the server's process has."""
    number = 0
    for path in os.listdir(f"/proc/{server.process.pid}/fd"):
        with contextlib.suppress(OSError):
            number += os.readlink(f"/proc/{server.process.pid}/fd/{path}").startswith("socket:")
    return number


def test_interrupt_ends_server_at_once_and_leaves_nothing(start_server, runs, tmp_path):
    """Also while a client holds a connection. Two runs: the split of one, scores alone of the other."""
    before = [set(workdir.rglob("*")) for workdir in runs.values()]
    lines = tmp_path / "lines.txt"
    lines.write_text("a red circle\n\na blue square\n!!\n", encoding="utf-8")
    both = f"--workdir={runs['mefn']},{runs['vsepp']}"
    server = start_server(both, "--step=latest", "--split=val", f"--captions={lines}")
    setup = json.loads(server.request("GET", "/api/setup")[2])
    assert [model["explains"] for model in setup["models"]] == ["entropies", "scores"]
    assert setup["models"][0]["gallery"] == setup["models"][1]["gallery"]
    for k in (0, 1):
        assert len(server.query("/api/search", caption="a red circle", model=k, top_k=3)["results"]) == 3
        ranked = server.query("/api/lines", position=0, model=k)["results"]
        assert {x["name"] for x in ranked} == {"a red circle", "a blue square"}
    status, _, body = server.request(
        "POST", "/api/explain", b'{"caption": "red", "position": 0, "model": 1}', {"Content-Type": "application/json"}
    )
    assert (status, json.loads(body)["error"][:29]) == (404, "this model has no attention t")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        status, seconds = server.interrupt()
    assert status == 130
    assert seconds < 1
    assert server.log.read_text().splitlines()[-1] == "error: ended by SIGINT"
    assert [set(workdir.rglob("*")) for workdir in runs.values()] == before
    assert list((server.log.parent / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workdir=a,b,c"], "--workdir names 3 runs"),
        (["--workdir=a,b", "--index=i"], "--index names 1 indexes for 2 runs"),
        (["--workdir=a", "--index=nothing"], "no index; make one with"),
        (["--host=example.com"], "--host=example.com: give an address"),
        (["--workdir=a", "--port=99999"], "99999"),
        (["--workdir=nothing", "--port=0"], "nothing"),
    ],
)
def test_serve_refuses_what_it_cannot_serve(words, message, command):
    assert message in refusal(command, "eval.py", "serve", *words)


def test_serve_names_port_that_is_taken(server, command, trained):
    error = refusal(command, "eval.py", "serve", f"--workdir={trained[0]}", f"--port={server.port}")
    assert f"--port={server.port}: cannot be used" in error


@pytest.mark.slow
def test_memory_does_not_grow_over_1000_requests(server, val):
    """Searches, explanations, images that are sent, pictures, and requests that fail, after 200 of them."""
    captions, data = val[1].all_captions(), val[1].record(0)["image"]
    explain = {"Content-Type": "application/json"}

    def send(k):
        caption = captions[k % len(captions)]
        server.query("/api/search", caption=caption)
        server.request("POST", "/api/explain", json.dumps({"caption": caption, "position": k % 20}), explain)
        server.request("POST", "/api/lines", data, IMAGE)
        server.request("GET", f"/image?position={k % 20}")
        server.request("GET", f"/nothing/{k}")
        time.sleep(0.05)  # below the rate that a client may send

    for k in range(40):
        send(k)
    before = read_resident_mib(server)
    for k in range(200):
        send(k)
    grown = read_resident_mib(server) - before
    print(f"{before:.0f} MiB, grown by {grown:.1f} MiB")
    assert grown < 20


def read_resident_mib(server) -> float:
    """Returns the memory that the server's process has in use, in MiB."""
    with open(f"/proc/{server.process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
