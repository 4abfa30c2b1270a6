"""The engine that serves: the same responses as `HFEngine.generate`, whoever else is there, and what goes wrong."""

from __future__ import annotations

import asyncio
import copy
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from itertools import count as counting
from typing import Any

import pytest
import torch
from tests.unit.device.test_declined import eager
from tests.unit.device.test_hf import PROBLEMS
from tests.unit.device.test_wording import merging

from selfroute.device.base import Sampling
from selfroute.device.batch import Batch, Row
from selfroute.device.hf import HFEngine
from selfroute.device.live import LiveConfig, LiveEngine
from selfroute.device.wording import Wording
from selfroute.errors import ContextError, DeviceError
from selfroute.protocol import HELP_OPEN, chat, parse
from selfroute.types import DeviceChunk, DeviceRequest, HelpCall, Response

REQUESTS = [DeviceRequest(chat(p.question), max_tokens=100, seed=f"s{n}") for n, p in enumerate(PROBLEMS)]

SETTINGS: Sequence[dict[str, Any]] = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"forbid_help": True},
    {"decide": "threshold", "bias": 2.0},
    {"decide": "threshold", "bias": -2.0, "temperature": 1.3},
    {"max_tokens": 7},
)


@pytest.fixture(scope="module")
def exact(engine: HFEngine) -> HFEngine:
    """The shipped model in double precision, where nothing depends on who else is there."""
    return HFEngine(copy.deepcopy(engine.model).double(), engine.tokenizer)


def generated(engine: HFEngine, requests: Sequence[DeviceRequest], *, early_exit: bool = False) -> list[Response]:
    """What the engine of training and evaluation makes of requests that have the same settings."""
    first = requests[0]
    sampling = Sampling(
        temperature=first.temperature,
        max_tokens=first.max_tokens,
        decide=first.decide,
        bias=first.bias,
        forbid_help=first.forbid_help,
        early_exit=early_exit,
    )
    prompts = [engine.encode(request.messages) for request in requests]
    return [group[0] for group in engine.generate(prompts, [[request.seed] for request in requests], sampling)]


async def told(live: LiveEngine, request: DeviceRequest) -> tuple[str, DeviceChunk]:
    """The whole text, and the last chunk."""
    chunks = [chunk async for chunk in live.stream(request)]
    assert not any(chunk.finish for chunk in chunks[:-1])
    return "".join(chunk.text for chunk in chunks), chunks[-1]


def assert_same(engine: HFEngine, request: DeviceRequest, found: tuple[str, DeviceChunk], expected: Response) -> None:
    text, last = found
    assert text == expected.text
    assert last.finish == ("stop" if expected.finished else "length")
    assert last.score == expected.score
    assert last.completion_tokens == len(expected.token_ids)
    assert last.prompt_tokens == len(engine.encode(request.messages))


@asynccontextmanager
async def serving(engine: HFEngine, **settings: Any) -> AsyncIterator[LiveEngine]:
    live = LiveEngine(LiveConfig(**settings), engine)
    try:
        yield live
    finally:
        await live.aclose()
        assert not live._thread.is_alive()


def served(engine: HFEngine, story: Callable[[LiveEngine], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        async with asyncio.timeout(120), serving(engine, **settings) as live:
            await story(live)

    asyncio.run(run())


def test_a_request_alone_is_generates_response_bit_for_bit(engine: HFEngine) -> None:
    async def story(live: LiveEngine) -> None:
        for request, changes in zip(REQUESTS * 2, SETTINGS, strict=False):
            request = replace(request, **changes)
            assert_same(engine, request, await told(live, request), generated(engine, [request])[0])

    served(engine, story)


def test_a_response_does_not_depend_on_who_else_is_there(exact: HFEngine) -> None:
    """Requests of all kinds come at any time, more than fit at a time."""
    alike = [[replace(request, **changes) for request in REQUESTS] for changes in SETTINGS]
    requests = [request for some in alike for request in some]

    async def story(live: LiveEngine) -> None:
        rng = random.Random(0)

        async def later(request: DeviceRequest) -> tuple[str, DeviceChunk]:
            for _ in range(rng.randrange(3)):
                # Behind a token or two of somebody else.
                async with aclosing(live.stream(replace(request, seed="other", max_tokens=2))) as chunks:
                    async for _ in chunks:
                        pass
            return await told(live, request)

        found = await asyncio.gather(*map(later, requests))
        expected = [response for some in alike for response in generated(exact, some)]
        for request, (text, last), response in zip(requests, found, expected, strict=True):
            assert_same(exact, request, (text, replace(last, score=response.score)), response)
            assert last.score == (None if response.score is None else pytest.approx(response.score, abs=1e-5))

    served(exact, story, max_streams=12)


def test_clients_that_leave_at_any_time_disturb_nobody_and_leave_nothing_behind(exact: HFEngine) -> None:
    requests = [replace(r, seed=f"{r.seed}/{n}", max_tokens=24) for n in range(10) for r in REQUESTS]

    async def story(live: LiveEngine) -> None:
        rng = random.Random(0)

        async def some(request: DeviceRequest) -> tuple[str, bool]:
            """What was told, and whether the client stayed."""
            text, patience = "", rng.choice([0, 1, 5, 99, 99])
            async with aclosing(live.stream(request)) as chunks:
                async for chunk in chunks:
                    if not patience:
                        return text, False
                    text, patience = text + chunk.text, patience - 1
            return text, True

        tasks = [asyncio.ensure_future(some(request)) for request in requests]
        for task in tasks[::7]:
            await asyncio.sleep(0)
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for n, (one, expected) in enumerate(zip(found, generated(exact, requests), strict=True)):
            if isinstance(one, BaseException):
                assert isinstance(one, asyncio.CancelledError)
                assert n % 7 == 0
            else:
                text, stayed = one
                assert text == expected.text if stayed else expected.text.startswith(text)
        assert not live._open
        assert not live._inboxes
        assert not live._waiting

    served(exact, story, max_streams=8)


def row(engine: HFEngine, text: str, name: str, max_tokens: int, sampling: Sampling) -> Row:
    prompt = Wording(engine, None, merges=True).read(DeviceRequest(({"role": "user", "content": text},), max_tokens))
    return Row(prompt, name, max_tokens, sampling)


def test_every_architecture_takes_rows_in_and_lets_them_go(tiny: HFEngine) -> None:
    """Also where a window is shorter than what was said, and where the newcomer's conversation is the longer one."""
    sampling = Sampling(forbid_help=True)
    batch = Batch(tiny, early_exit=False)
    rows = [row(tiny, "x" * (1 + 23 * n % 60), f"n{n}", 5 + 7 * n % 40, sampling) for n in range(12)]
    pieces: dict[Row, list[str]] = {r: [] for r in rows}
    coming = list(rows)
    with torch.no_grad():
        for step in counting():
            joining = [coming.pop(0) for _ in range(min(len(coming), (2, 0, 0, 1)[step % 4]))]
            assert not batch.join(joining)
            if step == 9:
                batch.rows[1].closed = True
                gone = batch.rows[1]
                batch.drop_closed()
                assert gone not in batch.rows
            for r, chunk in batch.step():
                assert isinstance(chunk, DeviceChunk)
                pieces[r].append(chunk.text)
            if not batch.rows and not coming:
                break
    for r in rows:
        [[expected]] = tiny.generate(
            [r.prompt.token_ids], [[r.name]], sampling.model_copy(update={"max_tokens": r.max_tokens})
        )
        assert r is gone or "".join(pieces[r]) == expected.text


def test_a_denied_help_call_goes_on_as_if_it_could_not_have_been(exact: HFEngine) -> None:
    async def story(live: LiveEngine) -> None:
        asked = 0
        owns = generated(exact, [replace(request, forbid_help=True) for request in REQUESTS])
        for request, own in zip(REQUESTS, owns, strict=True):
            text, _ = await told(live, replace(request, decide="threshold", bias=50.0))
            if not own.finished:
                continue
            assert isinstance(parse(text), HelpCall)
            asked += 1
            prefix = text[: text.rfind(HELP_OPEN)]
            again = replace(request, prefix=prefix, forbid_help=True)
            rest, last = await told(live, again)
            assert prefix + rest == own.text
            assert last.score == pytest.approx(own.score, abs=1e-5)
            count = len(exact.encode(request.messages)) + len(own.token_ids)
            assert last.prompt_tokens + last.completion_tokens == count
            # The limit counts what is new.
            cut, last = await told(live, replace(again, max_tokens=3))
            assert rest.startswith(cut)
            assert (last.finish, last.completion_tokens) == ("length", 3)
        assert asked > 2

    served(exact, story)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_first_token_that_must_begin_with_some_text_follows_the_model(temperature: float) -> None:
    made = merging()
    request = DeviceRequest(({"role": "user", "content": "x"},), 1, prefix="So.")
    prompt = Wording(made, None, merges=True).read(request)
    assert prompt.rest == "."
    batch = Batch(made, early_exit=False)
    count = 1000 if temperature else 1
    rows = [Row(prompt, f"n{n}", 1, Sampling(temperature=temperature)) for n in range(count)]
    with torch.no_grad():
        assert not batch.join(rows)
        events = batch.step()
        logits_V = made.model(torch.tensor([[*prompt.token_ids, *prompt.start]])).logits[0, -1].double()
    allowed = sorted(prompt.next_tokens)
    assert len(allowed) > 1
    first = torch.tensor([r.token_ids[len(prompt.start)] for r in rows])
    share = torch.tensor([(first == token).double().mean() for token in allowed])
    if temperature:
        expected = torch.softmax(logits_V[allowed] / temperature, 0)
        assert (share - expected).abs().max() < 4 * (0.25 / count) ** 0.5
    else:
        assert share[logits_V[allowed].argmax()] == 1
    # The text that the client has already is not told again.
    for r, chunk in events:
        assert isinstance(chunk, DeviceChunk)
        assert "." + chunk.text == made.decode(r.token_ids[len(prompt.start) :])


def test_declined_help_calls_that_are_taken_back_are_never_told(engine: HFEngine) -> None:
    asking = eager(engine, 18.0, 22.0)

    async def story(live: LiveEngine) -> None:
        assert not live.honours
        alike = [
            [replace(request, forbid_help=True) for request in REQUESTS],
            [replace(request, decide="threshold", bias=-30.0, temperature=0.5) for request in REQUESTS],
        ]
        found = await asyncio.gather(*(told(live, request) for some in alike for request in some))
        expected = [response for some in alike for response in generated(asking, some, early_exit=True)]
        for (text, last), response in zip(found, expected, strict=True):
            assert text == response.text
            assert last.score == pytest.approx(response.score, abs=1e-4)

    served(asking, story, early_exit=True)


def test_top_p_keeps_the_likeliest(exact: HFEngine) -> None:
    async def story(live: LiveEngine) -> None:
        assert live.honours == {"top_p"}
        for request in REQUESTS[:3]:
            greedy = await told(live, replace(request, temperature=0.0))
            assert (await told(live, replace(request, extra={"top_p": 0})))[0] == greedy[0]
            assert await told(live, replace(request, extra={"top_p": 1})) == await told(live, request)
        for value in ("x", 1.5, True, [1]):
            with pytest.raises(DeviceError, match="top_p is a number from 0 to 1"):
                await told(live, replace(REQUESTS[0], extra={"top_p": value}))

    served(exact, story)


class Passes:
    """Counts the model's passes, and lets one fail."""

    def __init__(self, engine: HFEngine) -> None:
        self.engine = HFEngine(copy.deepcopy(engine.model), engine.tokenizer)
        # It never ends by itself.
        self.engine.end_tokens = frozenset({len(engine.tokenizer)})
        self.count = 0
        self.fails: Callable[[torch.Tensor], Exception | None] = lambda ids: None
        self.engine.model.register_forward_pre_hook(self._pass, with_kwargs=True)

    def _pass(self, module: Any, args: Any, kwargs: Any) -> None:
        self.count += 1
        if error := self.fails(kwargs["input_ids"]):
            raise error


@pytest.fixture
def passes(engine: HFEngine) -> Passes:
    return Passes(engine)


LONG = replace(REQUESTS[0], max_tokens=900)


def live_of(passes: Passes, **settings: Any) -> LiveEngine:
    live = LiveEngine(LiveConfig(**settings), passes.engine)
    live._engine.end_tokens = live._batch.engine.end_tokens = passes.engine.end_tokens
    return live


def run(live: LiveEngine, story: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        try:
            async with asyncio.timeout(60):
                await story()
        finally:
            await live.aclose()

    asyncio.run(whole())


def test_a_client_that_leaves_stops_its_response_before_the_next_token(passes: Passes) -> None:
    live = live_of(passes, max_streams=1)

    async def story() -> None:
        stream = live.stream(LONG)
        await anext(stream)
        second = asyncio.ensure_future(told(live, replace(REQUESTS[1], max_tokens=5)))
        for _ in range(5):
            await anext(stream)
        assert not second.done()
        await stream.aclose()
        before = passes.count
        assert (await second)[1].completion_tokens == 5
        # One that was under way, a prompt, and five tokens.
        assert passes.count <= before + 7

    run(live, story)


def test_a_task_that_is_cancelled_leaves_too_even_while_it_waits(passes: Passes) -> None:
    live = live_of(passes, max_streams=1, max_waiting=1)

    async def story() -> None:
        first = live.stream(LONG)
        await anext(first)
        second = asyncio.ensure_future(told(live, LONG))
        while not live._waiting:
            await asyncio.sleep(0)
        with pytest.raises(DeviceError, match="2 requests are under way, which is the most"):
            await told(live, LONG)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert not live._waiting
        waiting = asyncio.ensure_future(told(live, replace(LONG, max_tokens=3)))
        await first.aclose()
        assert (await waiting)[1].finish == "length"
        assert live._open == 0
        assert not live._inboxes

    run(live, story)


def test_what_does_not_fit_is_refused_before_anything_runs(passes: Passes) -> None:
    live = live_of(passes, context=200)

    async def story() -> None:
        for request in (replace(LONG, max_tokens=150), replace(LONG, messages=chat("1" * 1_000_000), max_tokens=1)):
            with pytest.raises(ContextError):
                await told(live, request)
        assert passes.count == 0
        assert live._open == 0

    run(live, story)


def test_an_error_of_the_model_fails_those_that_are_there_and_nobody_later(passes: Passes) -> None:
    live = live_of(passes)

    async def story() -> None:
        streams = [live.stream(replace(LONG, seed=str(n))) for n in range(3)]
        for stream in streams:
            await anext(stream)
        errors = [torch.OutOfMemoryError("tried to allocate 2.00 GiB")]
        passes.fails = lambda ids: errors.pop() if errors else None
        for stream in streams:
            with pytest.raises(DeviceError, match=r"too little memory: lower device\.max_streams"):
                async for _ in stream:
                    pass
        await live.ready()
        text, _ = await told(live, replace(LONG, max_tokens=9))
        assert text == (await told(live, replace(LONG, max_tokens=9)))[0]

    run(live, story)


def test_a_prompt_that_the_model_fails_on_fails_alone(passes: Passes) -> None:
    live = live_of(passes)
    fatal = passes.engine.encode(chat("77777"))
    passes.fails = lambda ids: RuntimeError("no such thing\nat all") if ids.shape[1] >= len(fatal) - 1 else None

    async def story() -> None:
        first = live.stream(replace(LONG, messages=({"role": "user", "content": "1"},), max_tokens=60))
        said = [(await anext(first)).text]
        results = await asyncio.gather(
            told(live, replace(LONG, messages=chat("77777"), max_tokens=3)),
            told(live, replace(LONG, messages=({"role": "user", "content": "2"},), max_tokens=3)),
            return_exceptions=True,
        )
        assert isinstance(results[0], DeviceError)
        assert str(results[0]) == "the model failed: RuntimeError: no such thing"
        assert not isinstance(results[1], BaseException)
        said += [chunk.text async for chunk in first]
        assert len("".join(said)) > 20
        await live.ready()

    run(live, story)


def test_numbers_that_are_not_finite_fail_their_own_row(exact: HFEngine) -> None:
    broken = HFEngine(copy.deepcopy(exact.model), exact.tokenizer)
    seven = broken.tokenizer.convert_tokens_to_ids("7")

    def poison(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if kwargs["input_ids"].shape[1] == 1:
            output.logits[kwargs["input_ids"][:, -1] == seven] = torch.nan
        return output

    broken.model.register_forward_hook(poison, with_kwargs=True)

    async def story(live: LiveEngine) -> None:
        requests = [replace(r, seed=f"{r.seed}/{n}", max_tokens=20) for r in REQUESTS for n in range(4)]
        found = await asyncio.gather(*(told(live, r) for r in requests), return_exceptions=True)
        failed = 0
        for expected, one in zip(generated(exact, requests), found, strict=True):
            # A seven that comes last is never read.
            if seven in expected.token_ids[:-1]:
                assert isinstance(one, DeviceError)
                assert "not finite" in str(one)
                failed += 1
            else:
                assert not isinstance(one, BaseException)
                assert one[0] == expected.text
        assert 0 < failed < len(requests)
        await live.ready()

    served(broken, story)


def test_a_model_that_does_not_run_any_more_is_not_ready_until_it_does(passes: Passes) -> None:
    live = live_of(passes)

    async def story() -> None:
        await live.ready()
        passes.fails = lambda ids: RuntimeError("CUDA error: unspecified launch failure")
        with pytest.raises(DeviceError, match="unspecified launch failure"):
            await told(live, LONG)
        with pytest.raises(DeviceError, match=r"unspecified launch failure \(it is tried again"):
            await live.ready()
        passes.fails = lambda ids: None
        while True:
            try:
                await live.ready()
                break
            except DeviceError:
                await asyncio.sleep(0.01)
        assert (await told(live, replace(LONG, max_tokens=3)))[1].finish == "length"

    run(live, story)


def test_closing_the_engine_ends_what_is_under_way(passes: Passes) -> None:
    live = live_of(passes, max_streams=1)

    async def story() -> None:
        first = live.stream(LONG)
        await anext(first)
        second = asyncio.ensure_future(told(live, LONG))
        while not live._waiting:
            await asyncio.sleep(0)
        await live.aclose()
        for rest in (told(live, LONG), second, live.ready()):
            with pytest.raises(DeviceError, match="the device engine was closed"):
                await rest
        with pytest.raises(DeviceError, match="the device engine was closed"):
            async for _ in first:
                pass
        assert not live._thread.is_alive()

    run(live, story)


def test_closing_the_engine_does_not_wait_for_a_step_without_an_end(
    passes: Passes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("selfroute.device.live.CLOSE_S", 0.2)
    live = live_of(passes, max_streams=1)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(ids: torch.Tensor) -> None:
        hangs.set()
        goes_on.wait(60)

    async def story() -> None:
        passes.fails = hang
        stream = asyncio.ensure_future(told(live, LONG))
        await asyncio.to_thread(hangs.wait, 60)
        await live.aclose()
        assert live._thread.is_alive()
        assert "nobody waits for it any more" in caplog.text
        goes_on.set()
        with pytest.raises(DeviceError, match="the device engine was closed"):
            await stream

    run(live, story)
    assert not live._thread.is_alive()
