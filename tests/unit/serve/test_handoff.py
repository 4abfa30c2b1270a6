"""The story of a request: who answers, what the client sees of it, and that money is settled once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.serving import DOWN, UNREACHABLE, MemoryBudget, MemoryRecorder, ScriptedCloud, ScriptedDevice, said

from selfroute.errors import CloudError, ContextError, RejectedError
from selfroute.protocol import HELP_CALL, INSTRUCTION
from selfroute.serve.account import Limits
from selfroute.serve.asking import Ask
from selfroute.serve.events import Content, Course, Done, Event, Other, Reasoning, Turn
from selfroute.serve.handoff import Pair, answer
from selfroute.serve.refusal import RefusedError
from selfroute.types import CloudChunk, DeviceChunk, Policy

QUESTION = ({"role": "user", "content": "2+3?"},)
ASKS = said("hard", "\n<unk", HELP_CALL.removeprefix("<unk"))
ANSWERS = said("2+3=5", "<answer>", "5", "</answer>")
CUT = said("2+3=", finish="length")


@dataclass
class World:
    """One request's surroundings, and what it told."""

    device: ScriptedDevice = field(default_factory=lambda: ScriptedDevice(ANSWERS))
    cloud: ScriptedCloud = field(default_factory=lambda: ScriptedCloud("fi", "ve"))
    budget: MemoryBudget = field(default_factory=MemoryBudget)
    recorder: MemoryRecorder = field(default_factory=MemoryRecorder)
    idle_s: float = 60.0
    log_content: bool = False
    told: list[Event] = field(default_factory=list)
    course: Course = field(default_factory=Course)

    def ask(self, **changes: Any) -> None:
        asyncio.run(self.asking(**changes))

    async def asking(self, **changes: Any) -> None:
        async def tell(event: Event) -> None:
            self.told.append(event)

        how: Any = {"idle_s": self.idle_s, "log_content": self.log_content}
        pair = Pair(self.device, self.cloud, self.budget, self.recorder, **how)
        await answer(Ask(**{"id": "r1", "model": "m", "messages": QUESTION, **changes}), pair, tell, self.course)

    def refused(self, **changes: Any) -> RefusedError:
        with pytest.raises(RefusedError) as caught:
            self.ask(**changes)
        assert not any(isinstance(e, Done) for e in self.told)
        return caught.value

    @property
    def reasoning(self) -> str:
        return "".join(e.text for e in self.told if isinstance(e, Reasoning))

    @property
    def content(self) -> str:
        return "".join(e.text for e in self.told if isinstance(e, Content))

    @property
    def turns(self) -> list[tuple[str, str]]:
        return [(e.to, e.why) for e in self.told if isinstance(e, Turn)]

    @property
    def finish_reason(self) -> str:
        (done,) = [e for e in self.told if isinstance(e, Done)]
        assert self.told[-1] is done
        return done.finish_reason

    def closed(self) -> None:
        """All that was held back is settled, and the request is recorded once."""
        assert not self.budget.under_way
        assert self.budget.gateway.held == 0
        (record,) = self.recorder.records
        assert record.cost_usd == pytest.approx(sum(self.budget.settled))
        assert record.total_ms > 0


def test_the_device_answers() -> None:
    world = World()
    world.ask()
    assert (world.reasoning, world.content, world.finish_reason) == ("2+3=5", "5", "stop")
    assert not world.cloud.requests
    assert not world.turns
    world.closed()
    (record,) = world.recorder.records
    assert (record.route, record.score, record.status, record.cost_usd) == ("device", 1.5, 200, 0.0)
    assert (record.device_prompt_tokens, record.device_completion_tokens) == (10, 4)
    assert record.device_ms is not None
    assert record.cloud_ms is None
    assert world.device.requests[0].messages[0] == {"role": "system", "content": INSTRUCTION}


def test_a_help_call_goes_to_the_cloud() -> None:
    world = World(ScriptedDevice(ASKS))
    world.ask(fields={"temperature": 0.2})
    assert (world.reasoning, world.content, world.finish_reason) == ("hard", "five", "stop")
    assert world.turns == [("cloud", "help")]
    (request,) = world.cloud.requests
    assert request.messages == QUESTION
    assert request.temperature is None
    assert request.extra == {"temperature": 0.2}
    assert world.budget.settled == [0.002]
    world.closed()
    (record,) = world.recorder.records
    assert (record.route, record.cost_usd, record.cloud_prompt_tokens) == ("cloud", 0.002, 20)


def test_the_cloud_gets_the_reasoning_if_it_is_to() -> None:
    world = World(ScriptedDevice(ASKS))
    world.ask(handoff="reasoning")
    assert world.cloud.requests[0].messages[-1]["content"].endswith("\n\nhard")


def test_the_clouds_reasoning_stands_apart_from_the_devices() -> None:
    world = World(ScriptedDevice(ASKS), ScriptedCloud(CloudChunk(reasoning="I"), CloudChunk(reasoning=" see"), "five"))
    world.ask()
    assert world.reasoning == "hard\n\nI see"


def test_a_help_call_that_goes_on_is_stopped() -> None:
    world = World(ScriptedDevice([HELP_CALL, " " * 20, None]))
    world.ask()
    assert world.content == "five"
    assert world.device.stopped == 1


@pytest.mark.parametrize("script", [CUT, said("I do not know.")])
def test_no_decision_goes_to_the_cloud(script: Any) -> None:
    world = World(ScriptedDevice(script))
    world.ask()
    assert world.content == "five"
    assert world.turns == [("cloud", "undecided")]
    world.closed()


@pytest.mark.parametrize(("script", "finish"), [(CUT, "length"), (said("2+3="), "stop")])
def test_no_decision_stays_on_the_device_if_it_is_to(script: Any, finish: str) -> None:
    world = World(ScriptedDevice(script))
    world.ask(undecided="device")
    assert (world.content, world.finish_reason) == ("2+3=", finish)
    assert world.recorder.records[0].route == "undecided"
    assert not world.cloud.requests


def denied_by(limits: Limits) -> World:
    return World(ScriptedDevice(ASKS, said("so 2+3=5 <answer>5</answer>")), budget=MemoryBudget(limits))


@pytest.mark.parametrize("limits", [Limits(usd_per_day=0.019), Limits(share=0.0), Limits(calls_per_minute=0)])
def test_a_denied_help_call_goes_on_without(limits: Limits) -> None:
    world = denied_by(limits)
    world.ask(max_tokens=100)
    first, second = world.device.requests
    assert (first.prefix, first.forbid_help) == ("", False)
    assert (second.prefix, second.forbid_help) == ("hard\n", True)
    assert (first.max_tokens, second.max_tokens) == (100, 97)
    assert (world.reasoning, world.content, world.finish_reason) == ("hard\nso 2+3=5", "5", "stop")
    (name,) = limits.model_dump(exclude_unset=True)
    assert world.turns == [("cloud", "help"), ("device", name)]
    assert not world.cloud.requests
    world.closed()
    (record,) = world.recorder.records
    assert (record.route, record.denied, record.device_completion_tokens) == ("device", name, 4)


def test_a_device_that_asks_although_it_may_not_is_not_heard() -> None:
    again = said("or 6? ", HELP_CALL)
    world = World(ScriptedDevice(ASKS, again), budget=MemoryBudget(Limits(share=0.0)))
    world.ask()
    assert len(world.device.requests) == 2
    assert (world.content, world.finish_reason) == ("hard\nor 6?", "stop")
    assert world.recorder.records[0].route == "undecided"


def test_a_denied_response_without_a_decision_says_what_it_has() -> None:
    world = World(ScriptedDevice(CUT), budget=MemoryBudget(Limits(share=0.0)))
    world.ask()
    assert len(world.device.requests) == 1
    assert (world.content, world.finish_reason) == ("2+3=", "length")
    assert world.recorder.records[0].denied == "share"


def test_the_device_alone_may_not_ask() -> None:
    world = World()
    world.ask(policy="device-only")
    assert world.device.requests[0].forbid_help
    assert world.content == "5"


@pytest.mark.parametrize("script", [ASKS, CUT])
def test_what_may_not_leave_the_device_does_not(script: Any) -> None:
    world = World(ScriptedDevice(script))
    world.ask(policy="device-only")
    assert not world.cloud.requests
    assert not world.turns


def test_the_cloud_alone() -> None:
    call = {"delta": {"tool_calls": [{"index": 0, "id": "c1"}]}}
    world = World(cloud=ScriptedCloud(CloudChunk(other=call)))
    world.ask(policy="cloud-only", fields={"tools": []})
    assert not world.device.requests
    assert [e for e in world.told if isinstance(e, Other)] == [Other(call)]
    assert not world.turns
    assert world.recorder.records[0].route == "cloud"
    world.closed()


def test_what_the_device_cannot_serve_goes_to_the_cloud() -> None:
    world = World()
    world.ask(beyond="tools")
    assert not world.device.requests
    assert world.content == "five"


def test_what_the_device_cannot_serve_may_be_nobodys() -> None:
    device_only = World().refused(beyond="tools", policy="device-only")
    assert (device_only.status, device_only.param) == (400, "tools")
    denied = World(budget=MemoryBudget(Limits(share=0.0)))
    refusal = denied.refused(beyond="tools")
    assert (refusal.status, refusal.param, refusal.code) == (400, "tools", "budget_exceeded")
    denied.closed()


def test_too_long_a_conversation_goes_to_the_cloud() -> None:
    world = World(ScriptedDevice([ContextError("2,000 tokens do not fit 1,024")]))
    world.ask()
    assert world.content == "five"
    assert world.turns == [("cloud", "beyond")]
    alone = World(ScriptedDevice([ContextError("2,000 tokens do not fit 1,024")])).refused(policy="device-only")
    assert (alone.status, alone.code, alone.param) == (400, "context_length_exceeded", "messages")
    assert "1,024" in str(alone)
    device = ScriptedDevice([ContextError("2,000 tokens do not fit 1,024")])
    denied = World(device, budget=MemoryBudget(Limits(share=0.0))).refused()
    assert (denied.status, denied.code, denied.param) == (400, "budget_exceeded", "messages")
    assert str(denied).startswith("2,000 tokens do not fit 1,024, and the budget of cloud calls is used up")


def test_a_request_that_the_device_refuses_goes_to_the_cloud_or_is_the_clients_fault() -> None:
    world = World(ScriptedDevice([RejectedError("roles must alternate")]))
    world.ask()
    assert (world.content, world.turns) == ("five", [("cloud", "beyond")])
    alone = World(ScriptedDevice([RejectedError("roles must alternate")])).refused(policy="device-only")
    assert (alone.status, alone.code, alone.param) == (400, "device_refuses", None)
    assert "roles must alternate" in str(alone)


@pytest.mark.parametrize("policy", ["auto", "cloud-only"])
def test_reasoning_that_a_client_sends_back_stays(policy: Policy) -> None:
    thought = {"role": "assistant", "content": "4", "reasoning_content": "my thoughts"}
    calls = {"role": "assistant", "content": None, "reasoning_content": "the cloud", "tool_calls": [{"id": "c"}]}
    before = ({"role": "user", "content": "2+2?"}, thought, calls)
    messages = (*before, {"role": "user", "content": "2+3?"})
    world = World(ScriptedDevice(ASKS))
    world.ask(policy=policy, messages=messages)
    sent = world.cloud.requests[0].messages
    assert sent[1] == {"role": "assistant", "content": "4"}
    assert sent[2] == calls
    open_ = World(ScriptedDevice(ASKS))
    open_.ask(policy=policy, messages=messages, handoff="reasoning")
    assert open_.cloud.requests[0].messages[1] == thought


def test_the_cloud_alone_within_its_budget() -> None:
    world = World(budget=MemoryBudget(Limits(calls_per_minute=0)))
    refusal = world.refused(policy="cloud-only")
    assert (refusal.status, refusal.code) == (429, "budget_exceeded")
    world.closed()


def test_a_store_that_fails_grants_nothing() -> None:
    world = denied_by(Limits())
    world.budget.down = True
    world.ask()
    assert world.content == "5"
    assert world.recorder.records[0].denied == "store"
    alone = World()
    alone.budget.down = True
    assert alone.refused(policy="cloud-only").status == 503


BROKEN = {"down": [DOWN], "broken off": ["2+", DOWN], "hung": [None], "hung later": ["2+", None], "cut": ["2+3"]}


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN)
def test_a_device_that_fails_leaves_it_to_the_cloud(script: Any) -> None:
    world = World(ScriptedDevice(script), idle_s=0.1)
    world.ask()
    assert world.content == "five"
    assert world.turns == [("cloud", "device")]
    assert world.device.stopped == 1
    world.closed()


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN)
def test_a_device_that_fails_alone(script: Any) -> None:
    world = World(ScriptedDevice(script), idle_s=0.1)
    refusal = world.refused(policy="device-only")
    assert (refusal.status, refusal.code) == (503, "device_unavailable")
    assert not world.cloud.requests
    assert world.recorder.records[0].status == 503
    world.closed()


def test_a_device_that_fails_when_nobody_else_may() -> None:
    world = World(ScriptedDevice([DOWN]), budget=MemoryBudget(Limits(share=0.0)))
    assert world.refused().status == 503
    both = World(ScriptedDevice(ASKS, [DOWN]), budget=MemoryBudget(Limits(share=0.0)))
    assert both.refused().status == 503
    both.closed()


def test_nobody_answered_where_the_cloud_fails_and_then_the_device() -> None:
    world = World(ScriptedDevice(ASKS, [DOWN]), ScriptedCloud(UNREACHABLE))
    assert world.refused().status == 503
    # Else it would count as denied and as answered by the cloud.
    assert (world.recorder.records[0].route, world.recorder.records[0].denied) == ("", "cloud")
    world.closed()


def test_a_cloud_that_fails_before_it_answers_leaves_it_to_the_device() -> None:
    world = World(ScriptedDevice(ASKS, said("<answer>6</answer>")), ScriptedCloud(UNREACHABLE))
    world.ask()
    assert (world.content, world.finish_reason) == ("6", "stop")
    assert world.turns == [("cloud", "help"), ("device", "cloud")]
    assert world.device.requests[1].prefix == "hard\n"
    # It was never charged: neither money nor a call.
    assert (world.budget.settled, world.budget.released) == ([], 1)
    world.closed()
    assert (world.recorder.records[0].route, world.recorder.records[0].denied) == ("device", "cloud")


def test_reasoning_of_the_cloud_alone_is_no_answer() -> None:
    thinks = ScriptedCloud(CloudChunk(reasoning="Hm"), UNREACHABLE)
    world = World(ScriptedDevice(ASKS, said("<answer>6</answer>")), thinks)
    world.ask()
    assert (world.reasoning, world.content) == ("hard\n\nHm", "6")
    # It may have been charged.
    assert world.budget.settled == [0.01]
    world.closed()


def test_a_cloud_that_breaks_off_in_its_answer_is_an_error() -> None:
    world = World(ScriptedDevice(ASKS), ScriptedCloud("fi", UNREACHABLE))
    refusal = world.refused()
    assert (refusal.status, refusal.code) == (502, "cloud_broke_off")
    assert world.content == "fi"
    assert world.budget.settled == [0.01]
    world.closed()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UNREACHABLE, 502, "cloud_unavailable"),
        (CloudError("refuses the key", status=401), 502, "cloud_unavailable"),
        (CloudError("http://x is busy", status=429, retry_after_s=7), 429, "cloud_rate_limit"),
        (CloudError("the cloud at http://x: no", status=400, said="no such tool"), 400, "cloud_rejects"),
    ],
)
def test_a_cloud_alone_that_fails(error: CloudError, status: int, code: str) -> None:
    world = World(cloud=ScriptedCloud(error))
    refusal = world.refused(policy="cloud-only")
    assert (refusal.status, refusal.code, refusal.retry_after_s) == (status, code, error.retry_after_s)
    # Where the cloud is, and by which key it is asked, is nobody's business.
    assert str(error) not in str(refusal)
    assert error.said in str(refusal)
    world.closed()


async def gone(world: World, waiting: asyncio.Event, **changes: Any) -> None:
    task = asyncio.create_task(world.asking(**changes))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_client_that_goes_away_stops_the_device() -> None:
    async def main() -> World:
        world = World(ScriptedDevice(["2+", None]))
        await gone(world, world.device.waiting)
        return world

    world = asyncio.run(main())
    assert world.device.stopped == 1
    world.closed()
    assert (world.recorder.records[0].status, world.recorder.records[0].error) == (499, "client_gone")


def test_a_client_that_goes_away_stops_the_cloud_and_pays() -> None:
    async def main() -> World:
        world = World(ScriptedDevice(ASKS), ScriptedCloud("fi", None))
        await gone(world, world.cloud.waiting)
        return world

    world = asyncio.run(main())
    assert world.cloud.cancelled == 1
    assert world.budget.settled == [0.01]
    world.closed()


def test_the_answer_ends_before_the_clients_stop() -> None:
    world = World(ScriptedDevice(said("Q: hm <answer>5\nQ: 6?</answer>")))
    world.ask(stop=("\nQ:", "zz"))
    assert (world.reasoning, world.content, world.finish_reason) == ("Q: hm", "5", "stop")


def test_content_is_recorded_only_if_it_is_to_be() -> None:
    world = World(ScriptedDevice(ASKS))
    world.ask()
    assert (world.recorder.records[0].request, world.recorder.records[0].response) == (None, None)
    logged = World(ScriptedDevice(ASKS), log_content=True)
    logged.ask()
    assert logged.recorder.records[0].response == "five"
    assert "2+3?" in (logged.recorder.records[0].request or "")


def test_a_fault_of_ours_is_an_error_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    world = World(ScriptedDevice([KeyError("secret")]))
    refusal = world.refused()
    assert refusal.status == 500
    assert "secret" not in str(refusal)
    world.closed()


def test_what_a_device_is_asked_for() -> None:
    world = World()
    world.ask(max_tokens=5000, temperature=0.0, seed="7", bias=0.5, fields={"top_p": 0.9, "stop": "x", "user": "u"})
    (request,) = world.device.requests
    assert (request.max_tokens, request.temperature, request.seed, request.bias) == (1024, 0.0, "7", 0.5)
    assert request.extra == {"top_p": 0.9, "user": "u"}


def test_chunks_with_thinking_that_the_engine_tells_apart() -> None:
    world = World(ScriptedDevice([DeviceChunk(reasoning="hm"), DeviceChunk(text=HELP_CALL, finish="stop")]))
    world.ask()
    assert (world.reasoning, world.content) == ("hm", "five")
