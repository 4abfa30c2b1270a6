"""Device models by hub id, from a hub on loopback, and what is said where it refuses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from selfroute.device.load import model_path
from tests.model_hub import Hub

# Each starts a process that imports torch.
pytestmark = pytest.mark.slow

GATED, THERE, MISSING = "meta-llama/Llama-3.2-1B-Instruct", "someone/tiny", "someone/none"


def train(cwd: Path, model: str, endpoint: str, **environment: str) -> tuple[int, str]:
    """What `selfroute train` says of a model; the hub's address is read when its client is imported."""
    small = ["steps=1", "problems_per_step=2", "num_responses=2", "sampling.max_tokens=20", "task.train=20"]
    done = subprocess.run(
        [sys.executable, "-m", "selfroute", "train", "countdown-tiny", f"device.model={model}", *small, "--out", "run"],
        cwd=cwd, capture_output=True, text=True, timeout=240,
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cwd / "hub"), "HF_HUB_OFFLINE": "0", **environment},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub({GATED: None, THERE: Path(model_path("countdown-1m"))})


def test_a_model_by_hub_id_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    with hub:
        code, said = train(tmp_path, THERE, hub.url)
        assert code == 0, said
    # Now without the hub.
    (tmp_path / "again").mkdir()
    code, said = train(tmp_path / "again", THERE, hub.url, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert code == 0, said


@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_a_gated_model_says_how_to_get_in(hub: Hub, tmp_path: Path, token: str | None) -> None:
    with hub:
        code, said = train(tmp_path, GATED, hub.url, **({"HF_TOKEN": token} if token else {}))
    assert code == 1
    assert f"it is gated: accept its licence on {hub.url}/{GATED}, then log in with `hf auth login`" in said
    assert "set HF_TOKEN" in said
    assert "hf_secret" not in said
    assert (f"Bearer {token}" in hub.tokens) == (token is not None)


@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_a_model_that_is_not_there_is_said_so(hub: Hub, tmp_path: Path, token: str | None) -> None:
    with hub:
        code, said = train(tmp_path, MISSING, hub.url, **({"HF_TOKEN": token} if token else {}))
    assert code == 1
    assert f"{hub.url} has no model {MISSING}, or it is private" in said
    assert "countdown-1m" in said


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_a_network_it_says_how_to_bring_a_model(tmp_path: Path, offline: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    code, said = train(tmp_path, THERE, endpoint, HF_HUB_OFFLINE=offline)
    assert code == 1
    assert f"{endpoint} cannot be reached" in said
    assert f"`hf download {THERE} --local-dir FOLDER`, and give that folder as device.model" in said
