"""The one way out: who may go, who stays, and in which form."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from tests.serving import ScriptedFinder

from selfroute.errors import TaskError
from selfroute.serve.asking import Ask
from selfroute.serve.border import Border, Crossing, HeldBackError
from selfroute.serve.privacy import Privacy
from selfroute.types import CloudChunk, CloudRequest

MAIL = "a@b.org"


def cross(
    *messages: Mapping[str, Any],
    finder: ScriptedFinder | None = None,
    extra: Any = None,
    ask: Any = None,
    **settings: Any,
) -> Crossing:
    border = Border(Privacy(**settings), finder)
    asked = Ask(**{"id": "r", "model": "m", "messages": messages, "redact": True, **(ask or {})})
    return asyncio.run(border.cross(asked, CloudRequest(messages, temperature=None, extra=extra or {})))


def held_back(*messages: Mapping[str, Any], **settings: Any) -> HeldBackError:
    with pytest.raises(HeldBackError) as caught:
        cross(*messages, **settings)
    return caught.value


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_device_only_never_leaves() -> None:
    for finder in (None, ScriptedFinder(MAIL)):
        error = held_back(user("hi"), finder=finder, ask={"policy": "device-only", "redact": False})
        assert (error.reason, error.status) == ("policy", 403)


def test_without_rules_and_redaction_nothing_is_read() -> None:
    finder, messages = ScriptedFinder(MAIL), [user(MAIL * 100_000)]
    crossing = cross(*messages, finder=finder, ask={"redact": False})
    assert crossing.request.messages == tuple(messages)
    assert not finder.asked
    assert crossing.restoring is None


def test_redacted_and_back() -> None:
    call = {
        "role": "assistant",
        "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": f'{{"to": "{MAIL}"}}'}}],
    }
    crossing = cross(
        user([{"type": "text", "text": f"to {MAIL}"}]), call, user("bye"),
        finder=ScriptedFinder(MAIL), extra={"user": MAIL, "metadata": {MAIL: "x"}, "seed": 3},
    )  # fmt: skip
    assert MAIL not in repr(crossing.request)
    assert crossing.request.messages[0]["content"][0]["text"] == "to <EMAIL_1>"
    assert crossing.request.extra == {"user": "<EMAIL_1>", "metadata": {"<EMAIL_1>": "x"}, "seed": 3}
    assert crossing.counts == {"EMAIL": 1}
    assert crossing.restoring is not None
    assert [c.text for c in crossing.restoring.feed(CloudChunk(text="So <EMAIL_1>."))] == [f"So {MAIL}."]


def test_nothing_found_is_nothing_changed() -> None:
    messages = (user("hi"), user('{"a": "\\u00fc"}'))
    crossing = cross(*messages, finder=ScriptedFinder(MAIL))
    assert crossing.request.messages == messages
    assert (crossing.counts, crossing.restoring) == ({}, None)


def test_escapes_do_not_hide_it_from_the_rules() -> None:
    finder = ScriptedFinder(MAIL, "Müller")
    error = held_back({"role": "tool", "content": '{"n": "M\\u00fcller"}'}, finder=finder, rules="r.toml")
    assert (error.reason, error.status, error.rule, error.code) == ("rule", 403, "Müller", "rule")


def test_rules_are_in_force_without_redaction() -> None:
    finder = ScriptedFinder(MAIL, "falcon")
    assert held_back(user("x"), user("falcon"), finder=finder, rules="r", ask={"redact": False}).rule == "falcon"
    assert finder.asked == [(["x", "falcon"], False)]


@pytest.mark.parametrize(("content", "status"), [("x" * 101, 413), ([{"type": "image_url", "image_url": {}}], 400)])
def test_what_cannot_be_checked_stays(content: Any, status: int) -> None:
    finder = ScriptedFinder(MAIL)
    for more in ({}, {"ask": {"redact": False}, "rules": "r.toml"}):
        error = held_back(user(content), finder=finder, max_chars=100, **more)
        assert (error.reason, error.status, error.code) == ("privacy", status, "cannot_be_checked")
    assert not finder.asked


def test_images_pass_where_the_config_says_so() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
    plain = {"type": "image_url", "image_url": image["image_url"]["url"]}
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 5000}}
    parts = [image, plain, sound, {"type": "text", "text": MAIL}]
    finder = ScriptedFinder(MAIL)
    crossing = cross(user(parts), finder=finder, unreadable="pass", max_chars=100)
    assert crossing.request.messages[0]["content"] == [image, plain, sound, {"type": "text", "text": "<EMAIL_1>"}]
    assert finder.asked == [([MAIL], True)]
    # A text is not taken for a file, whatever it looks like and wherever it stands.
    elsewhere = [{"type": "text", "text": "A" * 5000}]
    sound = [{"type": "input_audio", "input_audio": {"data": "Project-4111", "format": "A" * 99}}]
    page = [{"type": "image_url", "image_url": {"url": "data:text/html;base64," + "A" * 5000}}]
    aside = [{"type": "image_url", "image_url": {"data": "A" * 5000}}]
    address = [{"type": "image_url", "image_url": {"url": "https://a.org/" + "A" * 5000}}]
    for content in ("A " * 5000, "A" * 5000, elsewhere, address, page, aside, sound):
        assert held_back(user(content), finder=finder, unreadable="pass", max_chars=100).status == 413


def test_a_check_that_fails_or_is_slow_lets_nothing_out(caplog: pytest.LogCaptureFixture) -> None:
    for finder in (ScriptedFinder(MAIL, failure=TaskError("undecided")), ScriptedFinder(MAIL, slow=True)):
        error = held_back(user(MAIL), finder=finder, timeout_s=0.05)
        assert (error.reason, error.status, error.retry_after_s) == ("privacy", 503, 5)
    assert "request r: its check" in caplog.text
    assert MAIL not in caplog.text


def test_a_border_that_cannot_redact_lets_nothing_out_that_asks_for_it() -> None:
    assert held_back(user("hi")).reason == "privacy"


def test_many_empty_texts_are_too_long() -> None:
    refusal = held_back(user([{"type": "text", "text": ""}] * 200), finder=ScriptedFinder(MAIL), max_chars=100)
    assert (refusal.reason, refusal.status) == ("privacy", 413)
