"""The report page in a real browser, from a real server."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.e2e.test_cli import selfroute

RUN = ("demo", "--quick", "--out", "out")
COMPARISON = (
    *("compare", "compare-countdown", "--quick", "--out", "out", "seeds=[0]", "train.task.test=40"),
    'methods=["device_only", "gapg_decision", "gapg", "probe"]',
)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("command", "texts"),
    [
        (RUN, ("A device model that knows when to ask", "Handed to the cloud", "cloud alone", "CPU-seconds")),
        (COMPARISON, ("Every way to route", "Solving and routing told apart", "Hidden-state probe", "at commit")),
    ],
)
def test_the_page_renders_whole_and_asks_for_nothing_else(
    tmp_path: Path, command: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "this test needs Chromium: apt-get install chromium"
    selfroute(*command, cwd=tmp_path)
    asked: list[str] = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            asked.append(self.path)

    handler = functools.partial(Server, directory=str(tmp_path / "out"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = f"http://127.0.0.1:{server.server_port}/report.html"
        browser = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
        ]  # fmt: skip
        done = subprocess.run([*browser, "--dump-dom", page], capture_output=True, text=True, check=True, timeout=120)
        for text in texts:
            assert text in done.stdout
        # The page's own policy forbids every load; an attempt would stand in the console.
        assert "Content Security Policy" not in done.stderr
        for width in (1280, 390):
            shot = tmp_path / f"{width}.png"
            subprocess.run(
                [*browser, f"--screenshot={shot}", f"--window-size={width},2600", page],
                capture_output=True, check=True, timeout=120,
            )  # fmt: skip
            pixels = imread(shot)[..., :3]
            # Ours is the only strong blue: the curve and the table's row have been drawn.
            blue = (pixels[..., 2] > 0.5) & (pixels[..., 0] < 0.2) & (pixels[..., 1] < 0.6)
            assert blue.sum() > 200, f"no curve at width {width}"
        server.shutdown()
    assert "/report.html" in asked
    assert set(asked) <= {"/report.html", "/favicon.ico"}
