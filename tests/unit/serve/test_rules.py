"""The rule file: what it takes, and what it finds."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from selfroute.errors import ConfigError
from selfroute.serve.rules import Rule, matcher, read_rules

KNOWN = ("CREDIT_CARD", "PHONE_NUMBER")


def read(tmp_path: Path, text: str) -> tuple[Rule, ...]:
    path = tmp_path / "rules.toml"
    path.write_text(text, encoding="utf-8")
    return read_rules(path, lambda: KNOWN)


def found(text: str, **rule: object) -> list[str]:
    return [text[start:end] for start, end in matcher(Rule(name="r", action="block", **rule))(text)]  # type: ignore[arg-type]


def test_the_file_in_the_documentation(tmp_path: Path) -> None:
    page = Path(__file__).parents[3] / "docs" / "privacy.md"
    (example,) = [part for part in page.read_text(encoding="utf-8").split("```") if part.startswith("toml\n[[rules]]")]
    rules = {rule.name: rule for rule in read(tmp_path, example.removeprefix("toml\n"))}
    assert {name: rule.action for name, rule in rules.items()} == {
        "falcon": "block", "private-keys": "block", "cards": "block", "tickets": "redact",
    }  # fmt: skip
    assert matcher(rules["falcon"])("About project  falcon, FLC-7") == [(6, 21), (23, 28)]
    assert matcher(rules["private-keys"])("-----BEGIN RSA PRIVATE KEY-----")
    assert matcher(rules["tickets"])("see TCK-004711.") == [(4, 14)]


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(
            tmp_path,
            """
            [[rules]]
            name = "Upper"
            action = "drop"
            words = ["x"]
            [[rules]]
            name = "two"
            action = "block"
            words = ["x"]
            regex = "x"
            [[rules]]
            name = "none"
            action = "block"
            [[rules]]
            name = "bad"
            action = "block"
            regex = "(?=x)"
            [[rules]]
            name = "bad"
            action = "redact"
            regex = "x*"
            [[rules]]
            name = "who"
            action = "redact"
            entity = "FACE"
            [[rules]]
            name = "blank"
            action = "redact"
            words = ["x", " "]
            [[rules]]
            name = "more"
            action = "redact"
            words = ["x"]
            score = 1
            """,
        )
    lines = str(caught.value).splitlines()
    for index, expected in enumerate(
        [
            "rules.toml cannot be used",
            "rules[0] 'Upper' name: String should match",
            "rules[0] 'Upper' action: Input should be 'block' or 'redact'",
            "rules[1] 'two' needs exactly one of words, regex and entity, and has words, regex",
            "rules[2] 'none' needs exactly one of words, regex and entity, and has none",
            "rules[3] 'bad' regex: RE2 does not take it: invalid perl operator",
            "rules[4] 'bad' regex: it finds the empty text",
            "rules[4] 'bad' name: there is another rule of that name",
            "rules[5] 'who' entity: there is no 'FACE' (known: CREDIT_CARD, PHONE_NUMBER)",
            "rules[6] 'blank' words: one of them is empty",
            "rules[7] 'more' score: Extra inputs",
        ]
    ):
        assert expected in lines[index]
    assert len(lines) == 11


@pytest.mark.parametrize(
    "text", ["rules = 3", "rules = []", "[[rule]]\nname = 'x'", "x = ", "[[rules]]\nname=1\n[other]"]
)
def test_files_that_are_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"rules\.toml"):
        read(tmp_path, text)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rules(tmp_path / "none.toml", lambda: KNOWN)


def test_without_re2_the_install_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "re2", None)
    with pytest.raises(ConfigError, match=r"google-re2: pip install 'selfroute\[redact\]'"):
        read(tmp_path, "[[rules]]\nname = 'a'\naction = 'block'\nregex = 'x'")


def test_words() -> None:
    words = ("Project Falcon", "école", "FLC-7", "falcon nine")
    assert found("the PROJECT \n falcon. École! flc-7", words=words) == ["PROJECT \n falcon", "École", "flc-7"]
    assert found("Project\u00a0Falcon", words=words) == ["Project\u00a0Falcon"]
    assert found("projects falcon, Project Falcons, écoles, FLC-77, xFLC-7", words=words) == []
    # A longer phrase that goes on does not hide a shorter one that does not.
    assert found("falcon nines", words=("falcon nine", "falcon")) == ["falcon"]
    assert found("a.b axb", words=("a.b",)) == ["a.b"]


def test_expressions() -> None:
    assert found("TCK-123456 or tck-123456, Zürich", regex=r"TCK-\d{6}|Z.rich") == ["TCK-123456", "Zürich"]


def test_no_expression_takes_for_ever() -> None:
    begin = time.monotonic()
    for regex in ("(a+)+$", "(a|aa)+$", "(a*)*b"):
        found("a" * 50_000 + "c", regex=regex)
    assert time.monotonic() - begin < 10
