"""The system's Chromium, driven over a pipe by its own protocol (CDP): no driver, no port, no library."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio"),
    *("--disable-dev-shm-usage", "--font-render-hinting=none", "--remote-debugging-pipe"),
)
WAIT_S = 20.0


class Page:
    """A tab. What it asked for, what its console said and what threw is kept."""

    def __init__(self, browser: _Pipe, session: str) -> None:
        self._browser, self._session = browser, session
        self.asked: list[str] = []
        self.complaints: list[str] = []
        browser.listeners[session] = self._heard
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol; its result."""
        return self._browser.call(method, params, self._session)

    def open(self, url: str) -> None:
        """Go there, and wait until it has loaded."""
        self.js("window.left = true")
        self.call("Page.navigate", url=url)
        self.until("!window.left && document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page, promises awaited."""
        told = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        by = time.monotonic() + WAIT_S
        while True:
            try:
                if self.js(f"Boolean({expression})"):
                    return
            except RuntimeError:
                # The page went away under the question.
                pass
            assert time.monotonic() < by, f"never true: {expression}\n{self.js('document.body.innerText')}"
            time.sleep(0.02)

    def press(self, key: str, *, ctrl: bool = False) -> None:
        """A key, as somebody at a keyboard presses it."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}
        what = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 2 * ctrl}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        self.call("Input.dispatchKeyEvent", type="keyDown", **what, **({"text": text} if text and not ctrl else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **what)

    def type(self, text: str) -> None:
        """Text into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def size(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        """Change the window, and what its user prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=scale, mobile=width < 500,
        )  # fmt: skip
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def scripts(self, on: bool) -> None:
        """Whether the page's scripts run."""
        self.call("Emulation.setScriptExecutionDisabled", value=not on)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A picture of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _heard(self, event: dict[str, Any]) -> None:
        params = event["params"]
        match event["method"]:
            case "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("warning", "error"):
                self.complaints.append(params["entry"]["text"])


class _Pipe:
    """Messages of the protocol, each ended by a NUL."""

    def __init__(self, writing: int, reading: int) -> None:
        self._writing, self._reading = os.fdopen(writing, "wb", 0), os.fdopen(reading, "rb", 0)
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self.listeners: dict[str, Callable[[dict[str, Any]], None]] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def call(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        self._writing.write(json.dumps(message).encode() + b"\0")
        with self._changed:
            assert self._changed.wait_for(lambda: number in self._answers, WAIT_S), f"no answer to {method}"
            answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _listen(self) -> None:
        rest = b""
        while piece := self._reading.read(65536):
            *messages, rest = (rest + piece).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    with self._changed:
                        self._answers[message["id"]] = message
                        self._changed.notify_all()
                elif heard := self.listeners.get(message.get("sessionId", "")):
                    heard(message)


@contextmanager
def chromium() -> Iterator[Page]:
    """A tab of a browser of its own; fails, and does not skip, where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "this test needs Chromium: apt-get install chromium"
    ours, theirs = os.pipe(), os.pipe()
    # The browser has its ends at 3 and 4; meanwhile they must be neither.
    reads, writes = (fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (ours[0], theirs[1]))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            "bash",
            "-c",
            f'exec "$@" 3<&{reads} 4>&{writes}',
            "bash",
            program,
            *FLAGS,
            f"--user-data-dir={profile}",
        ]
        process = subprocess.Popen(
            [*command, "about:blank"], pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for fd in (reads, writes, ours[0], theirs[1]):
            os.close(fd)
        try:
            pipe = _Pipe(ours[1], theirs[0])
            target = pipe.call("Target.createTarget", {"url": "about:blank"})["targetId"]
            yield Page(pipe, pipe.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"])
        finally:
            process.terminate()
            process.wait(20)
