"""Headless Chromium, driven over a pipe by Chrome's DevTools protocol: clicks, keys and screenshots as a user's."""

import base64
import contextlib
import fcntl
import importlib.resources
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

TIMEOUT = 30.0  # seconds for an answer, or for something to appear on a page
KEYS = {"Tab": 9, "Enter": 13, "ArrowRight": 39, "ArrowLeft": 37, "Escape": 27}


def find_chromium() -> str:
    """Returns the path of Chromium; skips the test without one, but fails it where CI is set."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    message = "no Chromium: install it (Debian: apt-get install chromium) to run the tests in a browser"
    return pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


def find_faults(tab: "Tab") -> list:
    """Returns what axe-core finds on a page that is serious: ids, and the first elements."""
    tab.evaluate(importlib.resources.files("axe_core_python").joinpath("axe.min.js").read_text() + "; true")
    faults = tab.evaluate("axe.run(document, {resultTypes: ['violations']}).then((result) => result.violations)")
    assert tab.evaluate("typeof axe.version") == "string"
    return [
        (f["id"], f["impact"], f["nodes"][0]["html"][:200]) for f in faults if f["impact"] in ("serious", "critical")
    ]


class Chromium:
    """A running browser; `with Chromium(folder)` keeps its files in `folder`."""

    def __init__(self, folder: Path):
        command = [find_chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += ["--no-first-run", "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder / 'profile'}", "--disable-background-networking", "about:blank"]
        read_end, self._commands = os.pipe()
        self._answers, write_end = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (read_end, write_end)]  # not 3 or 4, which follow
        shell = ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", *command]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
        self._process = subprocess.Popen(shell, pass_fds=ends, env=os.environ | home, start_new_session=True, **quiet)
        for end in (read_end, write_end, *ends):
            os.close(end)
        self._number, self._results, self.events = 0, {}, queue.Queue()
        self._arrived = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(Exception):
            self.send("Browser.close", timeout=5)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        os.close(self._commands)

    def _listen(self) -> None:
        with os.fdopen(self._answers, "rb") as pipe:
            rest = b""
            while data := os.read(pipe.fileno(), 1 << 16):
                *messages, rest = (rest + data).split(b"\0")
                for message in map(json.loads, messages):
                    if "id" not in message:
                        self.events.put(message)
                        continue
                    with self._arrived:
                        self._results[message["id"]] = message
                        self._arrived.notify_all()

    def send(self, method: str, session: str | None = None, timeout: float = TIMEOUT, **params) -> dict:
        """Sends a command and returns its result. Raises RuntimeError with the browser's error."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._commands, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        with self._arrived:
            assert self._arrived.wait_for(lambda: message["id"] in self._results, timeout), f"{method}: no answer"
            answer = self._results.pop(message["id"])
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, url: str, width: int = 1280, height: int = 900, **media) -> "Tab":
        """Opens an address in a new tab of this size; `media` are media features such as prefers_color_scheme."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session, target)
        tab.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        tab.send("Emulation.setEmulatedMedia", features=features)
        tab.send("Page.enable")
        tab.send("Runtime.enable")
        tab.send("Log.enable")
        tab.send("Page.navigate", url=url)
        tab.wait_for("document.readyState == 'complete'")
        return tab


class Tab:
    """A tab of the browser."""

    def __init__(self, browser: Chromium, session: str, target: str):
        self._browser, self._session, self._target = browser, session, target

    def send(self, method: str, **params) -> dict:
        """Sends a command to this tab and returns its result."""
        return self._browser.send(method, self._session, **params)

    def evaluate(self, expression: str):
        """Returns the value of an expression of JavaScript, a promise's once it is known."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Waits until an expression of JavaScript is true."""
        end = time.monotonic() + TIMEOUT
        while True:
            with contextlib.suppress(AssertionError):  # while a page loads
                if self.evaluate(f"Boolean({condition})"):
                    return
            assert time.monotonic() < end, f"{condition}; the page shows: {self.evaluate('document.body.innerText')}"
            time.sleep(0.03)

    def find_center(self, selector: str) -> tuple[float, float]:
        """Returns the middle of an element, scrolled into view."""
        element = f"document.querySelector({json.dumps(selector)})"
        box = "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2];"
        x, y = self.evaluate(f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center'}}); {box} }})()")
        return x, y

    def hover(self, selector: str) -> None:
        """Moves the mouse over an element."""
        x, y = self.find_center(selector)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Clicks on an element."""
        self.hover(selector)
        x, y = self.find_center(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Types a text into the element that has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Presses a key."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
            self.send("Input.dispatchKeyEvent", type=kind, **code, **(text if kind == "keyDown" else {}))

    def take_screenshot(self, path: Path) -> None:
        """Writes a PNG of the whole page."""
        picture = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

    def print_pdf(self, path: Path) -> None:
        """Writes the page as it is printed, a PDF."""
        path.write_bytes(base64.b64decode(self.send("Page.printToPDF", printBackground=False)["data"]))

    def close(self) -> None:
        """Closes the tab."""
        self._browser.send("Target.closeTarget", targetId=self._target)
