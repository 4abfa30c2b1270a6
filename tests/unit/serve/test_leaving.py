"""What leaves, in the story of a request and over HTTP: redacted, restored, kept here by a rule, and recorded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from tests.serving import (
    DOWN,
    MemoryBudget,
    MemoryRecorder,
    ScriptedCloud,
    ScriptedDevice,
    ScriptedFinder,
    said,
    serving,
)  # fmt: skip

from selfroute.protocol import HELP_CALL
from selfroute.serve import handoff
from selfroute.serve.account import Limits
from selfroute.serve.app import Gateway, make_app
from selfroute.serve.asking import Ask
from selfroute.serve.border import Border
from selfroute.serve.config import GatewayConfig
from selfroute.serve.events import Content, Course, Event, Reasoning, Turn
from selfroute.serve.handoff import Pair, answer
from selfroute.serve.privacy import Privacy
from selfroute.serve.refusal import RefusedError

QUESTION = ({"role": "user", "content": "2+3?"},)
ASKS = said("hard", "\n<unk", HELP_CALL.removeprefix("<unk"))
ANSWERS = said("2+3=5", "<answer>", "5", "</answer>")
CUT = said("2+3=", finish="length")
MAIL = "a@b.org"
WRITE = ({"role": "user", "content": f"Write to {MAIL}"},)
FALCON = ({"role": "user", "content": "hi"}, {"role": "user", "content": "About the falcon"})


@dataclass
class World:
    """One request's surroundings, and what it told: a gateway that finds `MAIL`, and keeps what names the falcon."""

    device: ScriptedDevice
    cloud: ScriptedCloud = field(default_factory=lambda: ScriptedCloud("To <EMA", "IL_1", ">: hi <EMAIL_"))
    privacy: Privacy = field(default_factory=lambda: Privacy(rules="rules.toml"))
    budget: MemoryBudget = field(default_factory=MemoryBudget)
    recorder: MemoryRecorder = field(default_factory=MemoryRecorder)
    told: list[Event] = field(default_factory=list)

    @property
    def pair(self) -> Pair:
        border = Border(self.privacy, ScriptedFinder(MAIL, blocked="falcon"))
        return Pair(self.device, self.cloud, self.budget, self.recorder, border=border)

    async def tell(self, event: Event) -> None:
        self.told.append(event)

    def ask(self, **changes: Any) -> None:
        ask = Ask(**{"id": "r1", "model": "m", "messages": QUESTION, **changes})
        asyncio.run(answer(ask, self.pair, self.tell))
        self.closed()

    def refused(self, **changes: Any) -> RefusedError:
        with pytest.raises(RefusedError) as caught:
            self.ask(**changes)
        self.closed()
        return caught.value

    def text(self, kind: type[Content] | type[Reasoning]) -> str:
        return "".join(e.text for e in self.told if isinstance(e, kind))

    def closed(self) -> None:
        assert not self.budget.under_way
        assert len(self.recorder.records) == 1

    @contextmanager
    def client(self) -> Iterator[httpx2.Client]:
        gateway = Gateway(GatewayConfig(privacy=self.privacy), self.pair, self.budget)
        with serving(make_app(gateway)) as url, httpx2.Client(base_url=url, timeout=20) as client:
            yield client


SHORT = Privacy(rules="rules.toml", max_chars=100)


def post(client: httpx2.Client, content: str, **changes: Any) -> httpx2.Response:
    body = {"model": "selfroute", "messages": [{"role": "user", "content": content}], **changes}
    return client.post("/v1/chat/completions", json=body)


def test_what_leaves_is_redacted_and_what_comes_back_restored() -> None:
    world = World(ScriptedDevice(said(f"hard for {MAIL}\n", HELP_CALL)))
    world.ask(messages=WRITE, redact=True, handoff="reasoning", fields={"user": MAIL})
    (request,) = world.cloud.requests
    assert MAIL not in repr(request)
    assert "hard for <EMAIL_1>" in request.messages[-1]["content"]
    assert (world.text(Reasoning), world.text(Content)) == (f"hard for {MAIL}", f"To {MAIL}: hi <EMAIL_")
    assert MAIL in repr(world.device.requests)
    (record,) = world.recorder.records
    assert (record.route, record.redacted, record.rule) == ("cloud", '{"EMAIL": 1}', "")


def test_who_does_not_ask_is_not_redacted() -> None:
    world = World(ScriptedDevice(ASKS))
    world.ask(messages=WRITE)
    assert world.cloud.requests[0].messages == WRITE
    assert world.recorder.records[0].redacted == ""


@pytest.mark.parametrize("script", [ASKS, CUT])
def test_what_a_rule_keeps_goes_on_on_the_device(script: Any) -> None:
    world = World(ScriptedDevice(script, said("so <answer>6</answer>")))
    world.ask(messages=FALCON)
    assert not world.cloud.requests
    assert [e for e in world.told if isinstance(e, Turn)][-1] == Turn("device", "rule")
    (record,) = world.recorder.records
    assert (record.denied, record.rule, record.cost_usd) == ("rule", "falcon", 0.0)
    assert not world.budget.settled
    assert world.budget.gateway.window.totals(0.0) == (0, 0)


def test_a_rule_reads_the_reasoning_that_would_leave() -> None:
    for given, stays in (("reasoning", True), ("problem", False)):
        world = World(ScriptedDevice(said("the falcon\n", HELP_CALL), said("<answer>6</answer>")))
        world.ask(handoff=given)
        assert bool(world.cloud.requests) is not stays


@pytest.mark.parametrize("changes", [{"policy": "cloud-only"}, {"beyond": "tools"}])
def test_what_a_rule_keeps_from_the_cloud_alone_is_refused(changes: dict[str, Any]) -> None:
    world = World(ScriptedDevice(ANSWERS))
    refusal = world.refused(messages=FALCON, **changes)
    assert (refusal.status, refusal.code) == (403, "rule")
    assert str(refusal) == "the rule 'falcon' keeps this request on the device"
    assert (world.recorder.records[0].denied, world.recorder.records[0].rule) == ("rule", "falcon")
    assert not world.cloud.requests


def test_what_a_rule_keeps_when_the_device_is_down() -> None:
    refusal = World(ScriptedDevice([DOWN])).refused(messages=FALCON)
    assert (refusal.status, refusal.code) == (503, "device_unavailable")


def test_what_cannot_be_checked_goes_on_on_the_device() -> None:
    world = World(ScriptedDevice(ASKS, said("<answer>6</answer>")), privacy=SHORT)
    world.ask(messages=({"role": "user", "content": "x" * 101},))
    assert world.text(Content) == "6"
    assert world.recorder.records[0].denied == "privacy"
    assert World(ScriptedDevice(ANSWERS), privacy=SHORT).refused(
        messages=({"role": "user", "content": "x" * 101},), policy="cloud-only"
    ).status == 413  # fmt: skip


def test_a_denied_call_hid_nothing() -> None:
    world = World(ScriptedDevice(ASKS, said("<answer>6</answer>")))
    world.budget.limits = Limits(share=0.0)
    world.ask(messages=WRITE, redact=True)
    assert (world.recorder.records[0].denied, world.recorder.records[0].redacted) == ("share", "")


def test_the_border_is_asked_even_where_the_story_would_not_stop() -> None:
    """Whatever else goes wrong, `device-only` does not pass it."""
    world = World(ScriptedDevice(ASKS))
    ask = Ask(id="r1", model="m", messages=QUESTION, policy="device-only")

    denied = asyncio.run(handoff._Story(ask, world.pair, world.tell, Course())._cloud(ask.messages))
    assert denied is not None
    assert denied.limit == "policy"
    assert not world.cloud.requests
    assert not world.told


def test_a_client_may_ask_for_more_privacy_and_never_for_less() -> None:
    def counts(client: httpx2.Client, redact: bool | None) -> Any:
        option = {} if redact is None else {"selfroute": {"redact": redact}}
        answered = post(client, MAIL, **option)
        return answered.json()["selfroute"]["redacted"] if answered.status_code == 200 else answered.status_code

    for setting, expected in (
        ("asked", {None: {}, False: {}, True: {"EMAIL": 1}}),
        ("always", {None: {"EMAIL": 1}, False: 403, True: {"EMAIL": 1}}),
    ):
        world = World(ScriptedDevice(ASKS), privacy=Privacy(redact=setting))  # type: ignore[arg-type]
        with world.client() as client:
            assert {asked: counts(client, asked) for asked in expected} == expected


def test_redaction_in_both_apis_streamed_and_whole() -> None:
    cloud = ScriptedCloud("to <EM", "AIL_1", "> <")
    world = World(ScriptedDevice(ASKS), cloud, Privacy(redact="always"))
    with world.client() as client:
        assert post(client, MAIL).json()["choices"][0]["message"]["content"] == "to a@b.org <"
        chunks = [
            json.loads(line.removeprefix("data: "))
            for line in post(client, MAIL, stream=True).text.splitlines()
            if line.startswith("data: {")
        ]
        deltas = [c["choices"][0]["delta"].get("content") for c in chunks]
        assert [d for d in deltas if d] == ["to ", "a@b.org ", "<"]
        assert chunks[-1]["selfroute"]["redacted"] == {"EMAIL": 1}
        whole = client.post("/v1/responses", json={"model": "selfroute", "input": "to a@b.org"}).json()
        assert whole["output"][-1]["content"][0]["text"] == "to a@b.org <"
        streamed = client.post("/v1/responses", json={"model": "selfroute", "input": "to a@b.org", "stream": True})
        assert '"text":"to a@b.org <"' in streamed.text
        assert "EMAIL_1" not in streamed.text
    assert all("a@b.org" not in repr(request) for request in cloud.requests)


def test_a_rule_keeps_it_here() -> None:
    world = World(ScriptedDevice(ANSWERS))
    with world.client() as client:
        refused = post(client, model="selfroute-cloud", content="falcon 4711")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "rule")
        assert "4711" not in refused.text
        world.device.scripts = [ASKS, ANSWERS]
        kept = post(client, content="falcon 4711")
        assert (kept.json()["selfroute"]["denied"], kept.json()["selfroute"]["rule"]) == ("rule", "falcon")
        assert kept.headers["x-selfroute-denied"] == "rule"
    assert not world.cloud.requests
