"""Whatever the device, the cloud, the budget and the client do: one record, money settled once, nothing leaked."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serving import DOWN, UNREACHABLE, MemoryBudget, MemoryRecorder, ScriptedCloud, ScriptedDevice

from selfroute.errors import CloudError, ContextError
from selfroute.protocol import ANSWER_CLOSE, ANSWER_OPEN, HELP_CALL, HELP_CLOSE, HELP_OPEN
from selfroute.serve.account import Limits
from selfroute.serve.asking import Ask
from selfroute.serve.events import Content, Done, Event, Reasoning
from selfroute.serve.handoff import Pair, answer
from selfroute.serve.refusal import RefusedError
from selfroute.types import CloudChunk, DeviceChunk

STEPS = st.sampled_from(
    [
        *(
            "2+3=5",
            " ",
            "\n",
            "<unk",
            "nown>",
            HELP_CALL,
            HELP_CALL,
            ANSWER_OPEN,
            "5",
            ANSWER_CLOSE,
            "<think>",
            "</think>",
        ),
        *(" " * 20, DeviceChunk(reasoning="hm"), DeviceChunk(text="so", finish="length"), DeviceChunk(finish="stop")),
        *(DOWN, ContextError("too long"), KeyError("a fault of its own"), None),
    ]
)
SCRIPTS = st.lists(st.lists(STEPS, max_size=6).map(lambda s: [*s, DeviceChunk(finish="stop")]), min_size=1, max_size=2)
ANSWERS = st.lists(
    st.sampled_from(
        [
            *("fi", "ve", CloudChunk(reasoning="hm"), CloudChunk(other={"delta": {"refusal": "no"}})),
            *(UNREACHABLE, CloudError("busy", status=429), ValueError("a fault of its own"), None),
        ]
    ),
    max_size=4,
)
LIMITS = st.sampled_from([Limits(), Limits(share=0.0), Limits(usd_per_day=0.0), Limits(calls_per_minute=0)])
ASKED = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(["auto", "auto", "device-only", "cloud-only"]),
        "undecided": st.sampled_from(["cloud", "device"]),
        "handoff": st.sampled_from(["problem", "reasoning"]),
        "beyond": st.sampled_from(["", "", "", "tools"]),
    }
)


@settings(max_examples=300, deadline=None)
@pytest.mark.filterwarnings("error")
@given(SCRIPTS, ANSWERS, LIMITS, ASKED, st.none() | st.integers(0, 5))
def test_any_story_ends_well(
    scripts: list[Any], script: list[Any], limits: Limits, asked: dict[str, Any], leaves_after: int | None
) -> None:
    device, cloud = ScriptedDevice(*scripts), ScriptedCloud(*script)
    budget, recorder = MemoryBudget(limits), MemoryRecorder()
    told: list[Event] = []

    async def tell(event: Event) -> None:
        told.append(event)
        if len(told) == leaves_after:
            raise asyncio.CancelledError

    async def main() -> int:
        pair = Pair(device, cloud, budget, recorder, idle_s=0.001)
        asking = asyncio.create_task(
            answer(Ask(id="r1", model="m", messages=({"role": "user", "content": "2+3?"},), **asked), pair, tell)
        )
        # A cloud that hangs is its client's to give up; here it is the user who does.
        gives_up = asyncio.create_task(cloud.waiting.wait())
        await asyncio.wait({asking, gives_up}, return_when=asyncio.FIRST_COMPLETED)
        gives_up.cancel()
        asking.cancel()
        with suppress(RefusedError, asyncio.CancelledError):
            await asking
        await asyncio.gather(gives_up, return_exceptions=True)
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(main()) == 0
    (record,) = recorder.records
    assert not budget.under_way
    assert budget.gateway.held == 0
    assert len(budget.settled) + budget.released == len(cloud.requests) <= 1
    assert record.cost_usd == pytest.approx(sum(budget.settled))
    assert len(device.requests) <= 2
    assert device.open == 0
    ends = [n for n, event in enumerate(told) if isinstance(event, Done)]
    assert ends in ([], [len(told) - 1])
    if leaves_after is None or leaves_after > len(told):
        assert bool(ends) == (record.status == 200)
    if asked["policy"] == "device-only":
        assert not cloud.requests
    if asked["policy"] == "cloud-only" or asked["beyond"]:
        assert not device.requests
    for kind in (Reasoning, Content):
        said = "".join(event.text for event in told if isinstance(event, kind))
        assert not any(tag in said for tag in (ANSWER_OPEN, ANSWER_CLOSE, HELP_OPEN, HELP_CLOSE))
