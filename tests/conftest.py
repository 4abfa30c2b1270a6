"""Shared fixtures: the shipped model, small tasks, and clouds that fail on purpose."""

from __future__ import annotations

import os

# One thread everywhere: tests run beside each other and must not depend on the machine's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# There is no hub here; without this a missing model is looked for over and over.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
import torch

from selfroute.device.base import DeviceConfig
from selfroute.device.hf import HFEngine
from selfroute.tasks.sandbox import Sandbox

torch.set_num_threads(1)

# Runs in an environment of its own.
collect_ignore = ["clients/ask.py"]


@pytest.fixture(scope="session")
def engine() -> HFEngine:
    """The shipped device model; tests that train load their own."""
    return HFEngine.load(DeviceConfig(model="countdown-1m"))


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    """Fails, and does not skip, where programs cannot be isolated: apt-get install bubblewrap."""
    made = Sandbox()
    assert made.isolated()
    return made


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"
