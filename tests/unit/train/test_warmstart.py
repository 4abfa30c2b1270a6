from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from selfroute.config import validate
from selfroute.device.base import DeviceConfig
from selfroute.device.hf import HFEngine
from selfroute.errors import ConfigError
from selfroute.protocol import ANSWER_CLOSE, ANSWER_OPEN, HELP_CALL, DecisionPoint, chat
from selfroute.train.warmstart import (
    WarmstartConfig,
    _imitate,
    _model,
    decides,
    level,
    trace_loss,
    train_tokenizer,
    warmstart,
)

CONFIG = WarmstartConfig(result_weight=3.0, settle_weight=10.0)
POINT = DecisionPoint((0,), help=1, answer=2)


def loss(logits: torch.Tensor, targets: list[int]) -> torch.Tensor:
    """Three tokens: a free one, one that is determined, one that decides."""
    determined = torch.tensor([False, True, False])
    chance = torch.tensor([math.nan, math.nan, 0.25], dtype=torch.float64)
    return trace_loss(logits, torch.tensor(targets), determined, chance, POINT, CONFIG)


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


def test_the_token_that_decides_is_found_in_every_trace(engine: HFEngine) -> None:
    for tag, first in ((HELP_CALL, "unknown"), (f"{ANSWER_OPEN}1+2{ANSWER_CLOSE}", "answer")):
        ids = engine.tokenizer.encode("1:2+1=3?\n" + tag)
        assert [engine.decode([i]) for i, d in zip(ids, decides(ids, engine), strict=True) if d] == [first]


def test_the_second_phase_settles_l() -> None:
    """From nothing, l goes to the log-odds of the toss, on hits and on misses; with no weight on it, it does not."""
    logits = []
    tokenizer = train_tokenizer()
    for weight in (1000.0, 1e-6):
        config = WarmstartConfig(settle_weight=weight, problems_per_step=2, traces_per_problem=2)
        torch.manual_seed(0)
        made = HFEngine(_model(config, tokenizer), tokenizer)
        _imitate(made, config, "settle", 40, 2e-3, lambda line: None)
        [point] = made.points
        for mark in "!?":
            ids = [*made.tokenizer.encode(f"1:2+1=3,3+1=4{mark}\n"), *point.prefix]
            with torch.no_grad():
                last = made.model(torch.tensor([made.encode(chat("to make 4.")) + ids])).logits[0, -1]
            logits.append((last[point.help] - last[point.answer]).item())
    wanted = math.log(0.15 / 0.85)
    assert all(abs(value - wanted) < 0.1 for value in logits[:2]), logits
    assert all(abs(value - wanted) > 0.15 for value in logits[2:]), logits


def test_levelling_takes_the_tilt_out_and_touches_the_two_tags_alone() -> None:
    made = HFEngine.load(DeviceConfig(model="countdown-1m"))
    config = WarmstartConfig(problems_per_step=2)
    [point] = made.points
    weight = made.model.get_output_embeddings().weight
    with torch.no_grad():
        weight[point.help] += 0.5 * torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
    start = weight.detach().clone()
    before, after = level(made, config)
    assert abs(before) > 0.01
    assert abs(after) < 1e-6
    # Not quite zero: the embeddings are tied, so the prompt, which holds both words, has changed a little too.
    assert abs(level(made, config)[0]) < 0.02 * abs(before)
    moved = (weight != start).any(dim=1).nonzero()[:, 0].tolist()
    assert moved == sorted((point.help, point.answer))
    # Each side takes half.
    assert torch.allclose(weight[point.help] - start[point.help], start[point.answer] - weight[point.answer], atol=1e-6)


def test_levelling_without_misses_changes_nothing() -> None:
    made = HFEngine.load(DeviceConfig(model="countdown-1m"))
    start = made.model.get_output_embeddings().weight.detach().clone()
    hits = WarmstartConfig(problems_per_step=2, solution_probability=1.0, operators="+-*/", max_value=10**6)
    assert level(made, hits) == (0.0, 0.0)
    assert torch.equal(made.model.get_output_embeddings().weight, start)


def test_a_seed_gives_the_same_weights_twice(tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = WarmstartConfig(seed=seed, steps=2, settle_steps=2, problems_per_step=2, traces_per_problem=2)
        warmstart(config, tmp_path / name, report=lambda line: None)
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_a_short_warm_start_reports_and_states_its_provenance(tmp_path: Path) -> None:
    lines: list[str] = []
    config = WarmstartConfig(steps=2, settle_steps=2, problems_per_step=2, traces_per_problem=2, log_every=1)
    warmstart(config, tmp_path / "model", command="the command", report=lines.append)
    assert len(lines) == 6
    assert "results and marks wrong" in lines[-2]
    assert re.search(r"now [+-]0\.00000", lines[-1])
    provenance = json.loads((tmp_path / "model/warmstart.json").read_text())
    assert provenance["command"] == "the command"
    assert provenance["config"] == config.model_dump(mode="json")


def test_a_warm_start_goes_on_from_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    # Also on a machine whose models run elsewhere by themselves.
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    config = WarmstartConfig(
        start="countdown-1m", steps=1, settle_steps=1, problems_per_step=2, traces_per_problem=2,
        lr=1e-9, settle_lr=1e-9, help_probability=0.3, help_probability_after_hit=0.03,
    )  # fmt: skip
    warmstart(config, tmp_path / "model", report=lines.append)
    monkeypatch.undo()
    before, after = (
        HFEngine.load(DeviceConfig(model=m)).model.state_dict() for m in ("countdown-1m", str(tmp_path / "model"))
    )
    assert all(torch.allclose(before[k], after[k], atol=1e-3) for k in before)
    # A start that knows something of when to ask is not levelled.
    assert not any(line.startswith("level") for line in lines)


def test_a_task_without_traces_is_named() -> None:
    with pytest.raises(ConfigError, match="there are no traces of it"):
        validate(WarmstartConfig, {"task": {"name": "chess"}}, "test")
    with pytest.raises(ConfigError, match=r"leave task\.path out"):
        validate(WarmstartConfig, {"task": {"name": "countdown", "path": "x.jsonl"}}, "test")
