"""The exported model on a real llama-server: the same tokens, the same answers, and it does what the gateway asks."""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
from benchmarks.llama_server import llama_server
from benchmarks.page import ROOT, quantised

from selfroute import api
from selfroute.config import Choice
from selfroute.device.base import Sampling
from selfroute.device.hf import HFEngine
from selfroute.device.http import HTTPConfig, HTTPEngine
from selfroute.errors import ContextError
from selfroute.evaluate.remote import Remote
from selfroute.evaluate.run import read_outcomes
from selfroute.protocol import ANSWER_OPEN, HELP_CALL, HELP_OPEN, chat, parse
from selfroute.records import read_json, write_json
from selfroute.tasks import make_task
from selfroute.types import DeviceChunk, DeviceRequest, Problem
from tests.commands import selfroute
from tests.exported import CHECKPOINT, run_of_the_shipped_model

T = TypeVar("T")

GREEDY = Sampling(temperature=0, max_tokens=240)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "run"
    return run_of_the_shipped_model(path, task={"name": "countdown", "test": 20})


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[str]:
    with llama_server(api.export(run, "gguf")) as url:
        yield url


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return make_task(Choice(name="countdown")).load("test")[:200]


def with_engine(server: str, what: Callable[[HTTPEngine], Coroutine[Any, Any, T]], **changes: Any) -> T:
    async def run_it() -> T:
        engine = HTTPEngine(HTTPConfig(base_url=f"{server}/v1", **changes))
        try:
            await engine.ready()
            return await what(engine)
        finally:
            await engine.aclose()

    return asyncio.run(run_it())


def asked(problem: Problem, **changes: Any) -> DeviceRequest:
    return DeviceRequest(**{"messages": chat(problem.question), "max_tokens": 240, "temperature": 0.0, **changes})


def answered(server: str, requests: Sequence[DeviceRequest]) -> list[tuple[str, DeviceChunk]]:
    """Each response's text, what it began with included, and its last chunk."""

    async def ask(engine: HTTPEngine) -> list[tuple[str, DeviceChunk]]:
        got = []
        for request in requests:
            chunks = [chunk async for chunk in engine.stream(request)]
            got.append((request.prefix + "".join(chunk.text for chunk in chunks), chunks[-1]))
        return got

    return with_engine(server, ask)


def test_it_sees_the_tokens_that_the_model_was_trained_on(
    server: str, engine: HFEngine, problems: list[Problem]
) -> None:
    rng = random.Random(0)
    alphabet = "0123456789+-*/()=<>!?:, \n\t" + "abcxyzABC'" + "é中ß😀\u00a0"
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(300)]
    responses = engine.generate([engine.encode(chat(p.question)) for p in problems[:50]], [["a"]] * 50, Sampling())
    texts += [response.text for [response] in responses] + [HELP_CALL, f"so\n{ANSWER_OPEN}1+2</answer>"]
    with httpx2.Client(base_url=server) as http:
        for problem in problems[:50]:
            messages = [dict(message) for message in chat(problem.question)]
            prompt = http.post("/apply-template", json={"messages": messages}).json()["prompt"]
            tokens = http.post("/tokenize", json={"content": prompt, "add_special": True}).json()["tokens"]
            assert tokens == engine.encode(messages)
        for text in texts:
            tokens = http.post("/tokenize", json={"content": text, "parse_special": False}).json()["tokens"]
            assert tokens == engine.tokenizer.encode(text, add_special_tokens=False), text


def agreement(server: str, engine: HFEngine, problems: Sequence[Problem]) -> float:
    """The share of problems whose greedy response decides the same, with the same answer, in both engines."""
    streams = [["a"]] * len(problems)
    here = engine.generate([engine.encode(chat(p.question)) for p in problems], streams, GREEDY)
    with Remote(HTTPConfig(base_url=f"{server}/v1")) as remote:
        there = remote.generate([remote.encode(chat(p.question)) for p in problems], streams, GREEDY)
    same = [
        parse(a.text, finished=a.finished) == parse(b.text, finished=b.finished)
        for [a], [b] in zip(here, there, strict=True)
    ]
    return sum(same) / len(same)


def test_it_answers_as_the_model_does_in_process(server: str, engine: HFEngine, problems: list[Problem]) -> None:
    assert agreement(server, engine, problems[:30]) >= 0.9


@pytest.mark.slow
def test_it_answers_as_the_model_does_in_process_on_200_problems(
    server: str, engine: HFEngine, problems: list[Problem]
) -> None:
    assert len(problems) == 200
    assert agreement(server, engine, problems) >= 0.95


@pytest.mark.slow
def test_a_model_before_and_after_quantisation(tmp_path: Path) -> None:
    run = run_of_the_shipped_model(tmp_path / "run", task={"name": "countdown", "test": 20, "calibration": 20})
    api.calibrate(run, 0.3)
    file = tmp_path / "quantisation.json"
    subprocess.run([sys.executable, ROOT / "benchmarks/quantisation.py", run, "--out", file], check=True)
    found = read_json(file)
    assert list(found["rows"]) == ["in process", "F16", "Q8_0", "Q4_0"]
    assert [row.split(" | ")[0] for row in quantised(found).splitlines()[-4:]] == [
        f"| {name}" for name in found["rows"]
    ]
    own, dialled = (found["rows"]["F16"][key]["call_rate"]["value"] for key in ("own_odds", "at_budget"))
    records = [
        read_outcomes(run / "evaluations" / f"{name}@run-{CHECKPOINT}-f16" / "records.jsonl")
        for name in ("after", "budget-0.3")
    ]
    assert [own, dialled] == [sum(o.route == "cloud" for o in outcomes) / 20 for outcomes in records]


def test_its_odds_are_those_of_the_model(server: str, engine: HFEngine, problems: list[Problem]) -> None:
    prompts = [engine.encode(chat(p.question)) for p in problems[:10]]
    here = [group[0] for group in engine.generate(prompts, [["a"]] * 10, GREEDY)]
    there = answered(server, [asked(p) for p in problems[:10]])
    compared = [
        (a.score, last.score)
        for a, (text, last) in zip(here, there, strict=True)
        if a.text == text and a.score is not None
    ]
    assert len(compared) >= 6
    for a_score, score in compared:
        assert score == pytest.approx(a_score, abs=0.1)


def test_the_dial_turns(server: str, problems: list[Problem]) -> None:
    ask = [asked(p, decide="threshold", bias=100.0) for p in problems[:5]]
    answer = [asked(p, decide="threshold", bias=-100.0) for p in problems[:5]]
    for text, last in answered(server, ask):
        assert text.endswith(HELP_CALL)
        assert last.finish == "stop"
    for text, last in answered(server, answer):
        assert HELP_OPEN not in text
        assert ANSWER_OPEN in text
        assert last.finish == "stop"
        assert last.prompt_tokens > 50
        assert last.completion_tokens > 5


def test_a_declined_help_call_goes_on_from_where_it_asked(server: str, problems: list[Problem]) -> None:
    asks = [text for text, _ in answered(server, [asked(p, decide="threshold", bias=100.0) for p in problems[:5]])]
    begun = [text[: text.rfind(HELP_OPEN)] for text in asks]
    requests = [asked(p, prefix=prefix, forbid_help=True) for p, prefix in zip(problems[:5], begun, strict=True)]
    for prefix, (text, last) in zip(begun, answered(server, requests), strict=True):
        assert text.startswith(prefix)
        assert HELP_OPEN not in text
        assert text[len(prefix) :].startswith(ANSWER_OPEN)
        assert last.finish == "stop"


def test_help_can_be_forbidden_without_log_probabilities(server: str, problems: list[Problem]) -> None:
    async def ask(engine: HTTPEngine) -> list[str]:
        requests = [asked(p, temperature=1.0, seed=str(n), forbid_help=True) for n, p in enumerate(problems[:8])]
        return ["".join([chunk.text async for chunk in engine.stream(request)]) for request in requests]

    for text in with_engine(server, ask, top_logprobs=0):
        assert HELP_OPEN not in text


def test_a_seed_names_a_response(server: str, problems: list[Problem]) -> None:
    requests = [asked(problems[0], temperature=1.0, seed=seed) for seed in ("a", "a", "b", "c", "d")]
    texts = [text for text, _ in answered(server, requests)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 2


def test_a_conversation_that_does_not_fit_is_refused_at_once(server: str) -> None:
    with pytest.raises(ContextError):
        answered(server, [DeviceRequest(({"role": "user", "content": "1 " * 9000},), max_tokens=5)])


@asynccontextmanager
async def metrics(server: str) -> AsyncIterator[Callable[[], Coroutine[Any, Any, dict[str, float]]]]:
    async with httpx2.AsyncClient(base_url=server) as http:

        async def read() -> dict[str, float]:
            lines = (await http.get("/metrics")).text.splitlines()
            return {name: float(value) for name, _, value in (x.partition(" ") for x in lines if x[:1] != "#")}

        yield read


def test_closing_the_stream_stops_the_generation(server: str, problems: list[Problem]) -> None:
    generated, busy = "llamacpp:tokens_predicted_total", "llamacpp:requests_processing"

    async def ask(engine: HTTPEngine) -> None:
        async with metrics(server) as read:
            before = (await read())[generated]
            async with aclosing(engine.stream(asked(problems[0], max_tokens=3500))) as chunks:
                for _ in range(5):
                    await anext(chunks)
            deadline = time.monotonic() + 10
            while (await read())[busy]:
                assert time.monotonic() < deadline
            stopped = (await read())[generated]
            assert stopped - before < 1000
            assert (await read())[generated] == stopped

    with_engine(server, ask, extra={"ignore_eos": True})


def test_the_exported_model_is_evaluated_beside_the_one_in_process(run: Path, server: str) -> None:
    selfroute("evaluate", run)
    said = selfroute("evaluate", run, "--engine", f"{server}/v1")
    name = "after@run-step-000001-f16"
    assert "selfroute, own decision, on run-step-000001-f16" in said
    there = read_outcomes(run / "evaluations" / name / "records.jsonl")
    here = read_outcomes(run / "evaluations" / "after" / "records.jsonl")
    assert [o.problem for o in there] == [o.problem for o in here]
    assert {o.route for o in there} >= {"device", "cloud"}
    assert all(o.device_tokens > 5 for o in there)
    assert all(o.score is not None for o in there if o.route != "undecided")
    assert all(o.device_solve_share is not None for o in there if o.route == "cloud")
    # The dial as `calibrate` would leave it, at the median of l: half of them ask.
    middle = statistics.median(o.score for o in there if o.score is not None)
    write_json(run / "calibration.json", {"checkpoint": CHECKPOINT, "budgets": {"0.5": {"bias": -middle}}})
    dialled = api.evaluate(run, budget=0.5, engine=HTTPConfig(base_url=f"{server}/v1"))
    assert 0.3 <= sum(o.route == "cloud" for o in dialled) / len(dialled) <= 0.7
    assert [o.problem for o in dialled] == [o.problem for o in here]
    card = (api.export(run, "gguf", out=run / "again").parent / "README.md").read_text()
    assert "selfroute evaluate run --budget 0.5 --engine URL (run-step-000001-f16)" in card


def test_it_stands_behind_the_gateway(server: str, problems: list[Problem], tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "selfroute", "serve", "port=0", "device.name=http", f"device.base_url={server}/v1"),
        f"store={tmp_path / 'gateway.sqlite'}",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = next(word for word in process.stdout.readline().split() if word.startswith("http"))
            with httpx2.Client(base_url=url, timeout=60) as http:
                for bias, policy, route in (
                    (100, "auto", "cloud"),
                    (-100, "auto", "device"),
                    (100, "device-only", "device"),
                ):
                    body = {
                        "model": "selfroute",
                        "messages": [{"role": "user", "content": problems[1].question}],
                        "temperature": 0,
                        "selfroute": {"bias": bias, "policy": policy},
                    }
                    reply = http.post(f"{url}/chat/completions", json=body)
                    assert reply.status_code == 200, reply.text
                    message = reply.json()["choices"][0]["message"]
                    assert reply.headers["X-Selfroute-Route"] == route
                    assert message["reasoning_content"]
                    assert message["content"]
                    assert "<" not in message["reasoning_content"] + message["content"]
                    assert float(reply.headers["X-Selfroute-Score"]) < 50
        finally:
            process.terminate()
