"""A client's conversation, for the device and for the cloud."""

from __future__ import annotations

from typing import Any

import pytest

from selfroute.protocol import INSTRUCTION, cloud_request, handed_over, offered, text_of


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_the_choice_stands_below_the_clients_system_prompt() -> None:
    messages = [
        said("system", "Be brief."),
        said("user", "Hi"),
        said("developer", "No maths."),
        said("assistant", "Yes?"),
    ]
    assert offered(messages) == (
        said("system", f"Be brief.\n\nNo maths.\n\n{INSTRUCTION}"),
        said("user", "Hi"),
        said("assistant", "Yes?"),
    )
    assert offered([said("user", [{"type": "text", "text": "Hi"}])]) == (
        said("system", INSTRUCTION),
        said("user", "Hi"),
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a", "a"),
        (None, ""),
        ([{"type": "text", "text": "a"}, {"type": "image_url"}, 3, {"text": 4}], "a"),
        ({"a": 1}, ""),
    ],
)
def test_text_of_anything_that_a_client_may_send(content: object, text: str) -> None:
    assert text_of(content) == text


def test_the_cloud_gets_the_conversation_as_it_is() -> None:
    messages = [said("user", "2+3?"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    assert handed_over(messages, "") == tuple(messages)


def test_the_devices_reasoning_stands_below_what_the_user_said_last() -> None:
    asked = cloud_request("2+3?", "2+3=6").messages[-1]["content"]
    note = asked.removeprefix("2+3?\n\n")
    before = (said("system", "s"), said("user", "1+1?"), said("assistant", "2"))
    assert handed_over((*before, said("user", "2+3?")), "2+3=6") == (*before, said("user", asked))
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    assert handed_over([said("user", [image])], "2+3=6") == (said("user", [image, {"type": "text", "text": note}]),)
    assert handed_over(before, "2+3=6") == (*before, said("user", note))
