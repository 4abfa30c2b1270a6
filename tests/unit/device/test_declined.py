"""Help calls that are declined: what is drawn in their place, and that nothing of them is left."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.unit.device.test_hf import PROBLEMS, names, prompts

from selfroute.device.base import Sampling
from selfroute.device.declined import Redraws
from selfroute.device.hf import HFEngine
from selfroute.protocol import DecisionPoint, parse
from selfroute.types import HelpCall

DRAWS = 20_000


def drawn(
    points: Sequence[DecisionPoint], opened: Sequence[float], at_tag: Sequence[float]
) -> Counter[tuple[int, int]]:
    """(token, taken back) of many rows whose help call, tokens 1 and 5 or 5 alone, is declined."""
    redraws = Redraws(points, [f"row {n}" for n in range(DRAWS)], Sampling(max_tokens=4, early_exit=True))
    found: Counter[tuple[int, int]] = Counter()
    for row in range(DRAWS):
        if points[0].prefix:
            redraws.note(row, 1, 1, torch.tensor(opened).log())
        token, back = redraws.go_on(row, 1 + len(points[0].prefix), points[0], torch.tensor(at_tag).log())
        assert redraws.taken_back[row] == back
        found[token, back] += 1
    return found


def test_what_is_drawn_instead_is_all_else_that_could_have_come() -> None:
    # Token 1 opens the tag with 0.6, and asks (5) with 0.75, answers (4) with 0.2. The help call has 0.45 in all.
    found = drawn([DecisionPoint((1,), help=5, answer=4)], [0.3, 0.6, 0.1, 0, 0, 0], [0, 0, 0.05, 0, 0.2, 0.75])
    expected = {(0, 1): 0.3 / 0.55, (2, 1): 0.1 / 0.55, (4, 0): 0.15 / 0.55 * 0.8, (2, 0): 0.15 / 0.55 * 0.2}
    assert found.keys() == expected.keys()
    assert {k: v / DRAWS for k, v in found.items()} == pytest.approx(expected, abs=0.012)


def test_tags_that_share_nothing_need_no_taking_back() -> None:
    found = drawn([DecisionPoint((), help=5, answer=4)], [], [0.3, 0, 0, 0, 0.1, 0.6])
    assert {k: v / DRAWS for k, v in found.items()} == pytest.approx({(0, 0): 0.75, (4, 0): 0.25}, abs=0.012)


def test_a_tag_that_was_opened_before_the_draws_begin_stays_open() -> None:
    redraws = Redraws([DecisionPoint((1,), help=5, answer=4)], ["a"], Sampling(temperature=0, early_exit=True))
    assert redraws.go_on(0, 2, DecisionPoint((1,), help=5, answer=4), torch.tensor([0, 0, 1, 0, 2.0, 3])) == (4, 0)


def test_forms_of_a_tag_are_declined_one_after_the_other_and_once_each() -> None:
    """Tokens 1 and 2 open the tag; the help call, 5, is all but certain behind either."""
    forms = DecisionPoint((1,), help=5, answer=4), DecisionPoint((2,), help=5, answer=4)
    behind = torch.tensor([0.02, 0, 0, 0, 0.03, 0.95]).log()
    found: Counter[int] = Counter()
    for row in range(2_000):
        redraws = Redraws(forms, [f"row {row}"], Sampling(max_tokens=3, early_exit=True))
        redraws.note(0, 1, 1, torch.tensor([0.1, 0.5, 0.4, 0, 0, 0]).log())
        token, open_form, times = 5, 0, 0
        while token in (1, 2, 5):
            if token != 5:
                open_form = token - 1
                if not redraws.declined(0, 2, forms[open_form]):
                    assert redraws.odds(0, 2, forms[open_form], behind) < 10
            token, _ = redraws.go_on(0, 2, forms[open_form], behind)
            times += 1
            assert times <= 4
        found[token] += 1
    # 0 is drawn at once (0.1), or behind a tag (0.05 * 0.4 of what goes on there), and 4 behind a tag.
    total = 0.1 + 0.9 * 0.05
    assert found[4] / 2_000 == pytest.approx(0.9 * 0.03 / total, abs=0.03)


def eager(engine: HFEngine, opens: float, asks: float) -> HFEngine:
    """The shipped model, in float64, made to open a tag after each attempt and to ask behind it, by so many nats."""
    model = copy.deepcopy(engine.model).double()
    [point] = engine.points
    lines = [t for t in range(model.config.vocab_size) if engine.tokenizer.decode([t]) in ("?\n", "!\n")]

    def push(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        after = kwargs["input_ids"][:, -output.logits.shape[1] :]
        output.logits[..., point.prefix[0]] += opens * torch.isin(after, torch.tensor(lines))
        output.logits[..., point.help] += asks * (after == point.prefix[0])
        return output

    model.register_forward_hook(push, with_kwargs=True)
    return HFEngine(model, engine.tokenizer)


@pytest.fixture(scope="module")
def asking(engine: HFEngine) -> HFEngine:
    return eager(engine, 18.0, 22.0)


def plainly(engine: HFEngine, prompt: list[int], limit: int) -> tuple[list[int], int]:
    """A greedy response with help forbidden, one whole pass a token, and how often a help call was declined."""
    [point] = engine.points
    ids: list[int] = []
    declined = 0

    def chances(tokens: list[int]) -> torch.Tensor:
        return engine.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1].softmax(-1)

    with torch.no_grad():
        while len(ids) < limit and (not ids or ids[-1] not in engine.end_tokens):
            at = chances(ids)
            token = int(at.argmax())
            ids.append(token)
            if token != point.prefix[0] or len(ids) == limit:
                continue
            behind = chances(ids)
            if int(behind.argmax()) != point.help:
                continue
            declined += 1
            at[token] *= 1 - behind[point.help]
            if int(at.argmax()) != token:
                ids[-1] = int(at.argmax())
            else:
                behind[point.help] = 0
                ids.append(int(behind.argmax()))
    return ids, declined


def test_the_odds_of_asking_are_against_all_else() -> None:
    point = DecisionPoint((1,), help=5, answer=4)
    bare = DecisionPoint((), help=5, answer=4)
    redraws = Redraws([point, bare], ["a"], Sampling(early_exit=True))
    redraws.note(0, 1, 1, torch.tensor([0.3, 0.6, 0.1, 0, 0, 0]).log())
    at_tag = torch.tensor([0, 0, 0.05, 0, 0.2, 0.75]).log()
    assert redraws.odds(0, 2, point, at_tag) == pytest.approx(math.log(0.45 / 0.55))
    # A tag that was open before, or that needs no opening.
    assert redraws.odds(0, 3, point, at_tag) == pytest.approx(math.log(0.75 / 0.25))
    assert redraws.odds(0, 1, bare, at_tag) == pytest.approx(math.log(0.75 / 0.25))
    assert redraws.odds(0, 1, bare, torch.tensor([-999.0, 0, 0, 0, 0, 999])) < 30


@pytest.mark.parametrize("limit", [40, 100])
def test_a_declined_call_leaves_no_trace(asking: HFEngine, limit: int) -> None:
    """Rows that take tokens back go on as if these had never been; those that are cut, past the room of the cache."""
    sampling = Sampling(temperature=0, max_tokens=limit, forbid_help=True, early_exit=True)
    groups = asking.generate(prompts(asking), names(), sampling)
    times = 0
    for prompt, [response] in zip(prompts(asking), groups, strict=True):
        expected, declined = plainly(asking, prompt, limit)
        assert list(response.token_ids) == expected
        times += declined
    assert times > len(PROBLEMS), "each must decline something for this to say anything"


def test_what_goes_on_reasons_and_what_does_not_answers_at_once(asking: HFEngine) -> None:
    lengths = []
    for early in (True, False):
        sampling = Sampling(max_tokens=100, forbid_help=True, early_exit=early)
        responses = [r for group in asking.generate(prompts(asking), names(4), sampling) for r in group]
        assert not any(isinstance(parse(r.text, finished=r.finished), HelpCall) for r in responses)
        lengths.append(sum(len(r.token_ids) for r in responses))
    assert lengths[0] > 1.5 * lengths[1]


def test_the_highest_score_says_at_which_dial_it_asks(asking: HFEngine) -> None:
    """With the same streams, a dial asks exactly where the score of the response that never asks passes it."""
    never = Sampling(max_tokens=150, forbid_help=True, early_exit=True)
    groups = asking.generate(prompts(asking), names(4), never)
    scores = [r.score for group in groups for r in group]
    assert None not in scores
    threshold = sorted(scores)[len(scores) // 2] - 1e-6  # type: ignore[type-var]
    dial = Sampling(max_tokens=150, decide="threshold", bias=-threshold, early_exit=True)
    turned = asking.generate(prompts(asking), names(4), dial)
    asked = [isinstance(parse(r.text, finished=r.finished), HelpCall) for group in turned for r in group]
    assert asked == [score > threshold for score in scores]  # type: ignore[operator]
    assert 0 < sum(asked) < len(asked)
