"""Presidio and RE2 in real workers: what they find, and that a worker that is late is stopped and replaced."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import spacy

from selfroute.errors import ConfigError, TaskError
from selfroute.serve.asking import Ask
from selfroute.serve.border import Border
from selfroute.serve.privacy import Privacy
from selfroute.serve.search import Search, open_border
from selfroute.types import CloudChunk, CloudRequest

TEXT = (
    "Mail bob@example.org or ann.roe@host.internal, call +44 20 7946 0958 or 212-555-0187; card 4111 1111 1111 1111, "
    "DE89370400440532013000, my SSN is 536-90-4399, at 10.0.0.1. The account number is 12345678."
)


@pytest.fixture(scope="module")
def search() -> Iterator[Search]:
    """Redaction alone, by its defaults."""
    made = Search(Privacy(redact="always", timeout_s=20))
    yield made
    made.close()


@pytest.fixture(scope="module")
def with_rules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Search]:
    """Rules of each kind, and a model that knows one name; in one worker."""
    folder = tmp_path_factory.mktemp("rules")
    model = spacy.blank("en")
    model.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Jane Roe"}])  # type: ignore[attr-defined]
    model.to_disk(folder / "model")
    rules = [
        'name = "falcon"\nwords = ["falcon"]\naction = "block"',
        'name = "tickets"\nregex = "TCK-[0-9]+"\naction = "redact"',
        'name = "cards"\nentity = "CREDIT_CARD"\naction = "block"',
        'name = "addresses"\nentity = "IP_ADDRESS"\naction = "redact"',
    ]
    (folder / "rules.toml").write_text("\n".join(f"[[rules]]\n{rule}" for rule in rules))
    privacy = Privacy(redact="asked", rules=str(folder / "rules.toml"), model=str(folder / "model"), timeout_s=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfroute.serve.search.PROCESSES", 1)
        made = Search(privacy)
    yield made
    made.close()


def found(search: Search, *texts: str, redact: bool = True) -> list[list[tuple[str, str]]]:
    result = asyncio.run(search.find(texts, redact))
    assert not result["blocked"]
    return [[(text[s:e], kind) for s, e, kind in spans] for text, spans in zip(texts, result["spans"], strict=True)]


def test_patterns(search: Search) -> None:
    assert found(search, TEXT) == [
        [
            ("bob@example.org", "EMAIL"), ("ann.roe@host.internal", "EMAIL"), ("+44 20 7946 0958", "PHONE"),
            ("212-555-0187", "PHONE"), ("4111 1111 1111 1111", "CREDIT_CARD"), ("DE89370400440532013000", "IBAN"),
            ("536-90-4399", "US_SSN"), ("10.0.0.1", "IP"), ("12345678", "US_BANK_NUMBER"),
        ]
    ]  # fmt: skip


def test_weak_patterns_need_their_words(search: Search) -> None:
    assert found(search, "Use the numbers 2, 6 and 12345678 to make 23.") == [[]]
    # Seen once, with its word, it is seen without.
    assert found(search, "12345678!", "bank account 12345678") == [[("12345678", "US_BANK_NUMBER")]] * 2


@pytest.mark.parametrize("text", ["aa:bb:cc:dd:ee:ff", "ann@host.internal", "fe80::a"])
def test_personal_data_without_a_digit(search: Search, text: str) -> None:
    assert [t for t, _ in found(search, text)[0]] == [text]


def test_nothing_is_looked_for_that_nobody_asked_for(search: Search) -> None:
    assert found(search, TEXT, redact=False) == [[]]


def test_it_holds_no_socket_but_its_own_and_needs_no_torch(search: Search) -> None:
    found(search, TEXT)
    for pool in search._pools:
        for pid in pool.process_ids:
            links = []
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                # A file that it has closed by now is no socket of its own.
                with suppress(FileNotFoundError):
                    links.append(str(fd.readlink()))
            assert sum(link.startswith("socket:") for link in links) == 1
            assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("escape", [r"\n", r"\t", r"\r", r"\u000a", r"\/", r"\"", r"\\\n"])
@pytest.mark.parametrize("value", ["bob@example.org", "536-90-4399", "4111111111111111", "10.1.2.3"])
def test_what_stands_behind_an_escape_of_json(search: Search, escape: str, value: str) -> None:
    said = f'{{"note": "my SSN, card, ip, mail:{escape}{value}{escape}ok"}}'
    border = Border(Privacy(redact="always", timeout_s=20), search)
    tool = {"role": "tool", "tool_call_id": "1", "content": said}
    crossing = asyncio.run(
        border.cross(Ask(id="r", model="m", messages=(tool,), redact=True), CloudRequest((tool,), temperature=None))
    )
    left = crossing.request.messages[0]["content"]
    assert value not in left
    assert crossing.restoring is not None
    back = crossing.restoring.feed(CloudChunk(other={"delta": {"function_call": {"arguments": left}}}))
    restored = "".join(piece.other["delta"]["function_call"]["arguments"] for piece in back)
    assert json.loads(restored) == json.loads(said)


@pytest.mark.slow
def test_rules(with_rules: Search) -> None:
    def blocked(*texts: str) -> Any:
        return asyncio.run(with_rules.find(texts, False))["blocked"]

    # The first in the file's order, wherever it stands.
    assert blocked("card 4111 1111 1111 1111", "the Falcon") == "falcon"
    assert blocked("card 4111 1111 1111 1111") == "cards"
    assert found(with_rules, "TCK-12 at 10.0.0.1, bob@example.org", redact=False) == [
        [("TCK-12", "rule:tickets"), ("10.0.0.1", "IP")]
    ]
    assert found(with_rules, "Jane Roe, bob@example.org") == [[("Jane Roe", "PERSON"), ("bob@example.org", "EMAIL")]]


def until_two_are_idle(search: Search) -> None:
    by = time.monotonic() + 120
    while search._idle.qsize() < 2:
        assert time.monotonic() < by
        time.sleep(0.05)


def test_a_worker_that_is_late_is_stopped_and_replaced(search: Search) -> None:
    until_two_are_idle(search)
    before = {pid for pool in search._pools for pid in pool.process_ids}
    search._limit_s, limit_s = 0.05, search._limit_s
    with pytest.raises(TaskError):
        asyncio.run(search.find(["1." * 25_000], True))
    # The other one serves in the meantime.
    search._limit_s = limit_s
    assert found(search, "bob@example.org") == [[("bob@example.org", "EMAIL")]]
    until_two_are_idle(search)
    assert len({pid for pool in search._pools for pid in pool.process_ids} - before) == 1


def test_a_failure_tells_nothing_of_the_text(search: Search) -> None:
    with pytest.raises(TaskError) as caught:
        asyncio.run(search.find(["bob@example.org", 7], True))  # type: ignore[list-item]
    assert "bob" not in str(caught.value)
    assert str(caught.value) == "undecided: RuntimeError: TypeError"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "en_core_web_lg"}, "^hand-offs cannot be checked: no spaCy model 'en_core_web_lg' is installed: "),
        ({"entities": ["FACE"]}, r"^hand-offs cannot be checked: there is no FACE \(.*EMAIL_ADDRESS.*US_SSN"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Search(Privacy(redact="always", **settings))


def test_without_presidio_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfroute.serve.search.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"privacy.redact=asked needs presidio_analyzer: pip install 'selfroute\[redact"
    ):
        Search(Privacy(redact="asked"))


def test_a_gateway_that_neither_redacts_nor_has_rules_starts_no_worker() -> None:
    assert open_border(Privacy())[1] is None
