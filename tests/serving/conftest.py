"""The server as a user runs it, on the trained smoke run: a process of its own that Ctrl-C ends."""

import dataclasses
import http.client
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT, environment, reset_signals


@dataclasses.dataclass
class Server:
    """A running server: its process, its port, and the file with what it prints."""

    process: subprocess.Popen
    port: int
    log: object

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def request(self, method, path, body=None, headers=None) -> tuple[int, dict, bytes]:
        """Sends a request on a connection of its own; returns status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def query(self, path, **values) -> dict:
        """Sends a query as JSON, which must succeed, and returns its result."""
        status, _, body = self.request("POST", path, json.dumps(values), {"Content-Type": "application/json"})
        assert status == 200, body
        return json.loads(body.splitlines()[-1])

    def interrupt(self) -> tuple[int, float]:
        """Sends Ctrl-C; returns the exit status and the seconds until the process has ended."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30), time.monotonic() - start


@pytest.fixture(scope="session")
def start_server(cache, tmp_path_factory):
    """`start_server("--workdir=...", ...)` starts `eval.py serve` at a free port and returns the Server."""
    started = []

    def start(*words, **variables):
        log = tmp_path_factory.mktemp("server") / "log.txt"
        (log.parent / "tmp").mkdir()
        command = [sys.executable, str(ROOT / "eval.py"), "serve", "--port=0", *map(str, words)]
        env = environment(cache) | {"TMPDIR": str(log.parent / "tmp")} | variables
        options = {"cwd": ROOT, "env": env, "stderr": subprocess.STDOUT, "preexec_fn": reset_signals}
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, **options)
        started.append(process)
        end = time.monotonic() + 120
        while not (found := re.search(r"open http://127\.0\.0\.1:(\d+)/", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        return Server(process, int(found[1]), log)

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def server(start_server, trained):
    """A server of the trained run's val split, which prints what it compiles."""
    return start_server(f"--workdir={trained[0]}", "--split=val", JAX_LOG_COMPILES="1")
