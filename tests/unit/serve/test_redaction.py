"""Placeholders on the way out: all that is text, the same for the same, and none that was there before."""

from __future__ import annotations

import itertools
import json
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfroute.serve.finding import merged, spread
from selfroute.serve.redaction import Placeholders, legible, mapped, plain, texts_of, unreadable
from selfroute.serve.restoring import Restorer


def placed(*texts: str, kind: str = "EMAIL") -> tuple[list[str], dict[str, str]]:
    """Texts with "a@b" and "c@d" found in them, and what stands for what."""
    spans: list[Any] = [[(i, i + 3, kind) for i in range(len(t)) if t[i : i + 3] in ("a@b", "c@d")] for t in texts]
    placeholders = Placeholders(texts)
    return [placeholders.put(t, s) for t, s in zip(texts, spans, strict=True)], placeholders.originals


def test_the_same_for_the_same_all_through() -> None:
    assert placed("a@b, c@d", "so a@b!") == (
        ["<EMAIL_1>, <EMAIL_2>", "so <EMAIL_1>!"],
        {"<EMAIL_1>": "a@b", "<EMAIL_2>": "c@d"},
    )


@pytest.mark.parametrize("said", ["<EMAIL_1>", "<email_1>", r"\u003cEMAIL_1\u003e", "<EMAIL_1", "EMAIL_1 EMAIL_3"])
def test_no_placeholder_that_was_there_before(said: str) -> None:
    texts, originals = placed(f"{said} a@b", "c@d")
    assert "<EMAIL_1>" not in originals
    assert "<EMAIL_3>" not in originals or "_3" not in said
    assert texts[0].startswith(said)


def test_many_numbers_that_are_taken_take_no_time() -> None:
    taken = " ".join(f"<EMAIL_{n}>" for n in range(1, 20_000))
    assert placed(f"{taken} a@b")[1] == {"<EMAIL_20000>": "a@b"}


def test_a_rules_name_does_not_leave() -> None:
    placeholders = Placeholders(["falcon"])
    assert placeholders.put("falcon", [(0, 6, "rule:falcon")]) == "<REDACTED_1>"
    assert placeholders.counts == {"falcon": 1}


@given(st.text("ab@<>EMIL_1 ", max_size=40))
def test_going_out_and_back_is_nothing(text: str) -> None:
    spans = [(i, i + 2, "EMAIL") for i in range(0, len(text) - 1, 5)]
    placeholders = Placeholders([text])
    out = placeholders.put(text, spans)
    restorer = Restorer(placeholders.originals)
    assert restorer.feed(out) + restorer.end() == text


MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "T1"},
    {"role": "user", "content": [{"type": "text", "text": "T2"}], "name": "T3"},
    {
        "role": "assistant", "content": None, "refusal": "T4", "reasoning_content": "T5",
        "tool_calls": [{"id": "T6", "type": "function", "function": {"name": "T7", "arguments": '{"a": "T8"}'}}],
        "function_call": {"name": "T9", "arguments": "T10"}, "T11": {"T12": ["T13"]},
    },
    {"role": "tool", "tool_call_id": "T14", "content": "T15"},
    {"role": "T16", "content": ""},
]  # fmt: skip
EXTRA = {
    "user": "T17", "metadata": {"T18": "T19"}, "stop": ["T20"],
    "tools": [{"function": {"name": "T21", "parameters": {"properties": {"T22": {"enum": ["T23"]}}}}}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "T24"}}, "seed": 7, "x": None,
}  # fmt: skip


def test_every_text_is_found_and_nothing_of_the_apis() -> None:
    texts = texts_of([MESSAGES, EXTRA])
    joined = " ".join(texts)
    assert all(f"T{n}" in joined.replace('"', " ").replace("}", " ").split() for n in range(1, 25))
    # An empty text, and a field that is nobody's.
    assert [t for t in texts if "T" not in t] == ["", "x"]


def test_a_change_leaves_the_rest_as_it_is() -> None:
    tree = {"messages": MESSAGES, **EXTRA}
    assert mapped(tree, lambda text: text) == tree
    assert mapped(tree, str.lower)["messages"][2]["tool_calls"][0]["function"]["arguments"] == '{"a": "t8"}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r'{"n": "M\u00fcller"}', '{"n": "Müller"}'),
        (r'["\ud83d\ude00 \u0022 \u000a \\u00fc \u005c"]', r'["😀 \u0022 \u000a \\u00fc \u005c"]'),
        (r'{"half": "\ud83d"', r'{"half": "\ud83d"'),
        (r"M\u00fcller", r"M\u00fcller"),
        (r"{M\u00fcller}", r"{M\u00fcller}"),
        ("[" * 100_000 + r"\u00fc", "[" * 100_000 + r"\u00fc"),
    ],
)
def test_escapes_hide_nothing(text: str, expected: str) -> None:
    assert plain(text) == expected


@given(st.recursive(st.text(), lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside)))
def test_plain_json_means_the_same(value: Any) -> None:
    text = json.dumps(value)
    assert json.loads(plain(text)) == value


def test_what_is_in_json_is_known_without_its_escapes() -> None:
    text, placeholders = r'{"to": "Jane \"J\" Roe"}', Placeholders([])
    out = placeholders.put(text, [(8, 22, "PERSON")])
    assert out == '{"to": "<PERSON_1>"}'
    assert placeholders.originals == {"<PERSON_1>": 'Jane "J" Roe'}
    assert placeholders.put('Jane "J" Roe', [(0, 12, "PERSON")]) == "<PERSON_1>"


@given(st.recursive(st.text(), lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside)), st.data())
def test_json_stays_json_wherever_a_span_begins_and_ends(value: Any, data: Any) -> None:
    text = plain(json.dumps([value]))
    assert len(legible(text)) == len(text)
    inside = [m.span(1) for m in re.finditer(r'"((?:[^"\\]|\\.)*)"', text) if m.end(1) > m.start(1)]
    spans = []
    for start, end in inside:
        a, b = sorted(data.draw(st.tuples(st.integers(start, end), st.integers(start, end))))
        spans += [(a, b, "X")] if a < b else []
    json.loads(Placeholders([text]).put(text, spans))


def test_many_values_in_many_texts_take_no_time() -> None:
    texts = [" ".join(f"u{i}@corp{i}.org" for i in range(600)), *["x"] * 6000]
    spans = [[(m.start(), m.end(), "EMAIL") for m in re.finditer(r"\S+", texts[0])], *[[] for _ in range(6000)]]
    begin = time.monotonic()
    assert spread(texts, spans) == spans
    assert time.monotonic() - begin < 0.5


def test_a_value_is_found_in_one_text_and_not_across_two() -> None:
    assert spread(["ab\0cd, x", "ab", "cd", "ab\0cd"], [[(0, 5, "X")], [], [], []]) == [
        [(0, 5, "X")],
        [],
        [],
        [(0, 5, "X")],
    ]


@pytest.mark.parametrize("name", ["images", "videos", "attachments"])
def test_files_beside_the_content_hold_no_text(name: str) -> None:
    assert unreadable([{"content": "x"}, {"content": "what is it?", name: ["iVBORw0KGgo"]}]) == f"messages.1.{name}"
    assert unreadable([{"content": "x", name: []}]) == ""


def test_a_name_has_a_placeholder_that_apis_take() -> None:
    tool = {"type": "function", "function": {"name": "falcon-status", "description": "falcon"}}
    changed = mapped({"tools": [tool], "name": "<X_1>"}, lambda text: text.replace("falcon", "<REDACTED_1>"))
    function = {"name": "REDACTED_1-status", "description": "<REDACTED_1>"}
    assert changed == {"tools": [{"type": "function", "function": function}], "name": "<X_1>"}


def test_images_and_audio_hold_no_text() -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "input_audio", "input_audio": {}}]
    assert unreadable([{"content": "x"}, {"content": parts}]) == "messages.1.content.1"
    assert unreadable([{"content": parts[:1]}]) == ""


SPANS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)).map(lambda s: (s[0], s[0] + s[1], "X")), max_size=8)


@given(SPANS)
def test_spans_that_overlap_become_one(spans: list[Any]) -> None:
    result = merged(spans)
    assert {i for s, e, _ in result for i in range(s, e)} == {i for s, e, _ in spans for i in range(s, e)}
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(result))


def test_what_was_seen_once_is_seen_wherever_it_stands() -> None:
    texts = ["account 12345678", "12345678 or x12345678, 12345678"]
    found = spread(texts, [[(8, 16, "BANK")], []])
    assert found == [[(8, 16, "BANK")], [(0, 8, "BANK"), (23, 31, "BANK")]]
