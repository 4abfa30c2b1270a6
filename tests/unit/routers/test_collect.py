from __future__ import annotations

import numpy as np
import pytest
import torch

from selfroute.device.base import Sampling
from selfroute.device.hf import HFEngine
from selfroute.protocol import chat
from selfroute.routers.collect import Extra, collect
from selfroute.tasks.countdown import Countdown, CountdownConfig, problem

TASK = Countdown(CountdownConfig())
PROBLEMS = TASK.load("calibration")[:5]
SAMPLING = Sampling(max_tokens=120)


def test_attempts_hold_what_the_model_did(engine: HFEngine) -> None:
    attempts = collect(engine, PROBLEMS, SAMPLING, "s", extra=Extra(2, 3), variants_of=TASK.variants)
    assert [a.problem for a in attempts] == PROBLEMS
    for a in attempts:
        assert len(a.samples) == 2
        assert len(a.variants) == 3
        prompt = engine.encode(chat(a.problem.question))
        ids = list(a.response.token_ids)
        with torch.no_grad():
            output = engine.model(torch.tensor([[*prompt, *ids]]), output_hidden_states=True)
        log_prob = output.logits[0].log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).mean()
        assert a.confidence == pytest.approx(log_prob.exp().item(), rel=1e-3)
        assert np.allclose(a.prompt_state, output.hidden_states[-1][0, len(prompt) - 1].numpy(), atol=1e-4)
        if a.response.finished:
            assert a.response.decision_index is not None
            state = output.hidden_states[-1][0, len(prompt) - 1 + a.response.decision_index].numpy()
            assert np.allclose(a.state, state, atol=1e-4)
    assert any(a.response.finished for a in attempts)


def test_no_attempt_asks(engine: HFEngine) -> None:
    attempts = collect(
        engine, TASK.load("calibration")[:40], SAMPLING, "s", extra=Extra(1, 1), variants_of=TASK.variants
    )
    responses = [r for a in attempts for r in (a.response, *a.samples, *a.variants)]
    assert not any("external" in r.text for r in responses)


def test_more_samples_leave_the_first_as_it_is(engine: HFEngine) -> None:
    one = collect(engine, PROBLEMS, SAMPLING, "s")
    more = collect(engine, PROBLEMS, SAMPLING, "s", extra=Extra(samples=2))
    assert [a.response.text for a in one] == [a.response.text for a in more]
    assert one[0].samples == one[0].variants == ()


def test_a_cut_response_has_a_state_too(engine: HFEngine) -> None:
    [a] = collect(engine, PROBLEMS[:1], Sampling(max_tokens=6), "s")
    assert not a.response.finished
    assert a.state.shape == (128,)


def test_every_problem_has_as_many_variants(engine: HFEngine) -> None:
    few = [problem([5, 5, 7], 17), problem([5, 5, 5], 15)]
    attempts = collect(engine, few, SAMPLING, "s", extra=Extra(variants=4), variants_of=TASK.variants)
    assert [len(a.variants) for a in attempts] == [4, 4]
    # The same question again is another draw.
    assert len({r.token_ids for r in attempts[1].variants}) > 1
