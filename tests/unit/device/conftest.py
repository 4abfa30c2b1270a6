"""Fixtures that several files share."""

from __future__ import annotations

import pytest
import torch
from tests.checkpoints import FAMILIES, engine_of

from selfroute.device.hf import HFEngine


@pytest.fixture(params=FAMILIES)
def kind(request: pytest.FixtureRequest) -> str:
    """An architecture."""
    return str(request.param)


@pytest.fixture
def tiny(kind: str) -> HFEngine:
    """A random model of an architecture, in double precision, with a tokenizer of its family."""
    return engine_of(kind, torch.float64)
