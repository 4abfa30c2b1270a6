"""Both answers of each problem, of a model that asks before it has finished."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from tests.unit.device.test_declined import eager

from selfroute import api
from selfroute.cloud import make_cloud
from selfroute.cloud.memory import Cloud
from selfroute.config import Choice
from selfroute.device.base import Sampling
from selfroute.device.hf import HFEngine
from selfroute.evaluate.pair import Pair
from selfroute.evaluate.run import Outcome, calibration_responses, evaluate
from selfroute.protocol import HELP_OPEN, chat, cloud_request, parse, reasoning_of
from selfroute.tasks.countdown import Countdown, CountdownConfig
from selfroute.types import Handoff, HelpCall

TASK = Countdown(CountdownConfig(test=24, calibration=12))
GO_ON = Sampling(max_tokens=150, early_exit=True)


@pytest.fixture(scope="module")
def asking(engine: HFEngine) -> HFEngine:
    return eager(engine, 18.0, 22.0)


def outcomes(engine: HFEngine, run: Path, sampling: Sampling, *, handoff: Handoff = "problem") -> list[Outcome]:
    cloud = Cloud(make_cloud(Choice(name="oracle")), run / "cloud.sqlite")
    try:
        return evaluate(engine, TASK, cloud, sampling=sampling, seed=0, handoff=handoff)
    finally:
        cloud.close()


def prompts_paid(run: Path) -> list[int]:
    with sqlite3.connect(run / "cloud.sqlite") as db:
        return [tokens for (tokens,) in db.execute("SELECT prompt_tokens FROM calls ORDER BY id")]


def test_the_local_answer_of_an_early_help_call_is_that_of_the_reasoning_gone_on(
    asking: HFEngine, run_dir: Path
) -> None:
    problems = TASK.load("test")
    found = outcomes(asking, run_dir, GO_ON)
    asked = [o for o in found if o.route == "cloud"]
    assert len(asked) > 5
    # What it would have said without the help call: help forbidden from where it asked.
    prompts = [asking.encode(chat(p.question)) for p in problems]
    streams = [[f"0/test/{p.id}/0"] for p in problems]
    [first] = zip(*asking.generate(prompts, streams, GO_ON), strict=True)
    starts = [asking.tokenizer.encode(r.text.partition(HELP_OPEN)[0], add_special_tokens=False) for r in first]
    longer = 0
    for o, response, prompt, stream, start in zip(found, first, prompts, streams, starts, strict=True):
        assert o.response == response.text
        if o.route != "cloud":
            continue
        forbid = GO_ON.model_copy(update={"forbid_help": True})
        [[own]] = asking.generate([prompt], [[f"{stream[0]}/local"]], forbid, starts=[start])
        assert own.text.startswith(reasoning_of(o.response))
        assert not isinstance(parse(own.text, finished=own.finished), HelpCall)
        judged = parse(own.text, finished=own.finished)
        assert o.device_answer == getattr(judged, "text", None)
        assert o.score == max(s for s in (response.score, own.score) if s is not None)
        longer += own.text.count("\n") > o.response.count("\n")
    assert longer > len(asked) / 2


def test_a_dial_is_found_on_responses_that_never_ask(asking: HFEngine) -> None:
    drawn = [r for _, r in calibration_responses(asking, TASK, sampling=GO_ON, seed=0, draws=2)]
    assert len(drawn) == 24
    assert not any(isinstance(parse(r.text, finished=r.finished), HelpCall) for r in drawn)


def test_the_cloud_is_handed_the_reasoning_of_those_that_asked_alone(engine: HFEngine, tmp_path: Path) -> None:
    usual = Sampling(max_tokens=150)
    alone = outcomes(engine, tmp_path / "alone", usual)
    both = outcomes(engine, tmp_path / "both", usual, handoff="reasoning")
    asked = [n for n, o in enumerate(both) if o.route == "cloud"]
    assert 0 < len(asked) < len(both)
    assert [(o.response, o.correct) for o in alone] == [(o.response, o.correct) for o in both]
    costs = [(a.cloud_cost_usd, b.cloud_cost_usd) for a, b in zip(alone, both, strict=True)]
    assert [n for n, (a, b) in enumerate(costs) if b > a] == asked
    # One call a problem.
    assert len(prompts_paid(tmp_path / "alone")) == len(prompts_paid(tmp_path / "both")) == 24


def test_a_question_is_handed_over_as_the_config_says(tmp_path: Path) -> None:
    sizes = {}
    for handoff in ("problem", "reasoning"):
        config = api.load_train_config("countdown-tiny", [f"evaluation.handoff={handoff}", "sampling.early_exit=true"])
        engine = eager(HFEngine.load(config.device), 30.0, 30.0)
        cloud = Cloud(make_cloud(config.cloud), tmp_path / handoff / "cloud.sqlite")
        with Pair(config, engine, cloud, config.evaluation) as pair:
            reply = pair.answer("numbers 3, 7, 25; target 46")
        assert reply.route == "cloud"
        [sizes[handoff]] = prompts_paid(tmp_path / handoff)
    text = cloud_request(reply.question, reasoning_of(reply.reasoning)).messages[-1]["content"]
    assert sizes["reasoning"] - sizes["problem"] == pytest.approx((len(text) - len(reply.question)) / 4, abs=1)
