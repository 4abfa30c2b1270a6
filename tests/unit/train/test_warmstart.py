from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from selfroute.protocol import DecisionPoint
from selfroute.train.warmstart import WarmstartConfig, trace_loss, warmstart

CONFIG = WarmstartConfig(help_probability=0.25, result_weight=3.0, settle_weight=10.0)
POINT = DecisionPoint((0,), help=1, answer=2)


def loss(logits: torch.Tensor, targets: list[int]) -> torch.Tensor:
    """Three tokens: a free one, one that is forced, one that decides."""
    forced, decides = torch.tensor([False, True, False]), torch.tensor([False, False, True])
    return trace_loss(logits, torch.tensor(targets), forced, decides, POINT, CONFIG)


def test_the_weighted_loss_by_hand() -> None:
    # Uniform over four tokens: each cross-entropy is log 4, and so is that of any toss.
    value = loss(torch.zeros(3, 4, dtype=torch.float64), [3, 3, 1])
    assert value.item() == pytest.approx((1 + 3 + 10) * math.log(4))


def test_a_decision_learns_the_chance_of_asking_not_the_toss() -> None:
    gradients = []
    for tag in (POINT.help, POINT.answer):
        logits = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
        loss(logits, [3, 3, tag]).backward()
        assert logits.grad is not None
        gradients.append(logits.grad)
    assert torch.equal(*gradients)
    # weight * (softmax - target), the target 0.25 on asking and 0.75 on answering.
    assert gradients[0][2].tolist() == pytest.approx([2.5, 0.0, -5.0, 2.5])


def test_a_short_warm_start_reports_and_states_its_provenance(tmp_path: Path) -> None:
    lines: list[str] = []
    config = WarmstartConfig(steps=2, settle_steps=2, problems_per_step=2, traces_per_problem=2, log_every=1)
    warmstart(config, tmp_path / "model", command="the command", report=lines.append)
    assert len(lines) == 5
    assert "results and marks wrong" in lines[-1]
    provenance = json.loads((tmp_path / "model/warmstart.json").read_text())
    assert provenance["command"] == "the command"
    assert provenance["config"] == config.model_dump(mode="json")
