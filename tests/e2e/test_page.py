"""The report page in a real browser, offline."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.e2e.test_cli import selfroute


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_renders_whole_and_asks_nobody(tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "this test needs Chromium: apt-get install chromium"
    selfroute("demo", "--quick", "--out", "out", cwd=tmp_path)
    page = (tmp_path / "out/report.html").as_uri()
    log = tmp_path / "net.json"
    browser = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}",
    ]  # fmt: skip
    dom = subprocess.run([*browser, "--dump-dom", page], capture_output=True, text=True, check=True, timeout=120).stdout
    for text in ("A device model that knows when to ask", "Handed to the cloud", "cloud alone", "CPU-seconds"):
        assert text in dom
    asked = re.findall(r'"url":"([a-z]+):', log.read_text())
    assert "file" in asked, "the log must show the page itself"
    assert set(asked) <= {"file", "data", "chrome", "about"}
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
