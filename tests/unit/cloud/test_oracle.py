from __future__ import annotations

import asyncio

import pytest

from selfroute.cloud import check_questions
from selfroute.cloud.oracle import Oracle, OracleConfig
from selfroute.config import Choice
from selfroute.errors import CloudError
from selfroute.protocol import cloud_request, parse
from selfroute.tasks.countdown import Countdown, CountdownConfig, problem, verify
from selfroute.types import Answer, CloudAnswer, CloudClient, Problem


def correct(oracle: Oracle, count: int) -> list[bool]:
    task = Countdown(CountdownConfig())

    async def ask() -> list[bool]:
        verdicts = []
        for p in task.load("test")[:count]:
            read = parse((await oracle.complete(cloud_request(p.question))).text)
            assert isinstance(read, Answer)
            assert read.well_formed
            verdicts.append(task.verify(read.text, p).correct)
        return verdicts

    return asyncio.run(ask())


def test_it_is_right_on_its_stated_share_and_on_the_same_problems() -> None:
    first = correct(Oracle(OracleConfig()), 1000)
    assert abs(sum(first) / 1000 - 0.95) < 0.02
    assert correct(Oracle(OracleConfig()), 200) == first[:200]
    assert correct(Oracle(OracleConfig(seed=1)), 200) != first[:200]


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_extremes(accuracy: float) -> None:
    assert set(correct(Oracle(OracleConfig(accuracy=accuracy)), 100)) == {accuracy == 1.0}


def test_price_and_latency_are_as_stated() -> None:
    request = cloud_request(Countdown(CountdownConfig()).load("test")[0].question)
    answer = asyncio.run(Oracle(OracleConfig(completion_tokens=1000, latency_s=3.0)).complete(request))
    assert answer.latency_s == 3.0
    assert answer.completion_tokens == 1000
    assert answer.cost_usd == pytest.approx((answer.prompt_tokens * 0.55 + 1000 * 2.19) / 1e6)


def test_the_stream_adds_up_to_the_answer_and_can_be_left() -> None:
    oracle: CloudClient = Oracle(OracleConfig())
    assert isinstance(oracle, CloudClient)
    request = cloud_request(Countdown(CountdownConfig()).load("test")[0].question)

    async def listen() -> tuple[str, CloudAnswer | None]:
        text, final = "", None
        async for chunk in oracle.stream(request):
            text += chunk.text
            final = chunk.final or final
        return text, final

    async def leave() -> None:
        stream = oracle.stream(request)
        await anext(stream)
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    text, final = asyncio.run(listen())
    assert final is not None
    assert text == final.text
    asyncio.run(leave())


def test_cancelling_the_caller_cancels_the_request() -> None:
    oracle = Oracle(OracleConfig(wait=True, latency_s=60))
    request = cloud_request(Countdown(CountdownConfig()).load("test")[0].question)

    async def give_up() -> None:
        async with asyncio.timeout(0.05):
            await oracle.complete(request)

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())


def test_a_problem_without_a_solution_gets_a_wrong_answer() -> None:
    request = cloud_request(Countdown(CountdownConfig()).read("1, 1, 1; 99").question)
    answer = asyncio.run(Oracle(OracleConfig(accuracy=1.0)).complete(request))
    read = parse(answer.text)
    assert isinstance(read, Answer)
    assert not verify(read.text, [1, 1, 1], 99).correct


def test_a_wrong_answer_is_wrong_even_where_every_way_comes_to_the_target() -> None:
    request = cloud_request(problem([0, 0, 0], 0).question)
    read = parse(asyncio.run(Oracle(OracleConfig(accuracy=0.0)).complete(request)).text)
    assert isinstance(read, Answer)
    assert not verify(read.text, [0, 0, 0], 0).correct


def test_it_finds_the_question_above_the_reasoning_that_it_is_handed() -> None:
    oracle = Oracle(OracleConfig())
    for p in Countdown(CountdownConfig()).load("test")[:20]:
        other = problem([1, 2, 3], 99).question
        alone, handed = (cloud_request(p.question, text) for text in ("", f"1:7+5=12,12+9=21?\n{other}"))
        answers = [asyncio.run(oracle.complete(request)) for request in (alone, handed)]
        assert answers[0].text == answers[1].text
        assert answers[0].prompt_tokens < answers[1].prompt_tokens


def test_questions_that_it_cannot_answer_are_found_out_before_it_is_asked() -> None:
    known = [*Countdown(CountdownConfig()).load("test")[:20], Problem("1", "Add the numbers 1 and 2.")]
    other = Problem("2", "What is the capital of France?")
    for name in ("oracle", "selfroute.cloud.oracle:Oracle"):
        check_questions(Choice(name=name), known)
        with pytest.raises(CloudError, match=r"not 'What is the capital of France\?': name a real one in \[cloud\]"):
            check_questions(Choice(name=name), [*known, other])
    check_questions(Choice(name="openai"), [other])


def test_other_questions_are_an_error() -> None:
    with pytest.raises(CloudError, match=r"Countdown and addition questions only: name a real one") as caught:
        asyncio.run(Oracle(OracleConfig()).complete(cloud_request("What is the capital of France?")))
    # A gateway tells it to the client as a request that the cloud rejects, and its log holds no question.
    assert (caught.value.status, "France" in f"{caught.value}{caught.value.said}") == (400, False)
