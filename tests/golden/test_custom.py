"""What the verifiers of a user's own rows say of answers: settings, the row's reference, the answer, the verdict."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from selfroute.config import Choice
from selfroute.tasks import make_task
from selfroute.tasks.custom import Custom
from selfroute.types import Problem

EXACT: list[tuple[dict[str, Any], Any, str, bool]] = [
    ({}, "Paris", "Paris", True),
    ({}, "Paris", " paris\n", True),
    ({}, "New York", "new  york", True),
    ({}, "New York", "NewYork", False),
    ({}, "Paris", "Paris.", False),
    ({}, "Paris", "Paris or Rome", False),
    ({}, "Paris", "", False),
    ({}, ["Paris", "Lutetia"], "lutetia", True),
    ({}, ["Paris", "Lutetia"], "Paris, Lutetia", False),
    ({}, "caf\u00e9", "cafe\u0301", True),
    ({}, "Straße", "STRASSE", True),
    ({}, True, "True", True),
    ({}, True, "false", False),
    ({}, 12, "12", True),
    ({"ignore": []}, "Paris", "paris", False),
    ({"ignore": ["space"]}, "a b", " a  b", True),
    ({"ignore": ["space"]}, "a b", "A b", False),
    ({"ignore": ["case"]}, "a b", "A b", True),
    ({"ignore": ["case"]}, "a b", "a  b", False),
    ({}, "x", "x" * 20_001, False),
]
NUMBER: list[tuple[dict[str, Any], Any, str, bool]] = [
    ({}, 42, "42", True),
    ({}, 42, "42.0", True),
    ({}, 42.0, " 042 ", True),
    ({}, 1234, "1,234", True),
    ({}, 0.5, "1/2", True),
    ({}, 0.5, r"\boxed{\frac{1}{2}}", True),
    ({}, 0.1, "0.1", True),
    ({}, -3, "−3", True),
    ({}, -3, "3", False),
    ({}, "1e3", "1000", True),
    ({}, 42, "The answer is 42.", True),
    ({}, 42, "42 apples", True),
    ({}, 42, "42 millions", False),
    ({}, 42, r"42\text{ dozens}", False),
    ({}, 42, r"42\text{ percent}", False),
    ({}, "5 km", "5 m", False),
    ({}, "5 km", "5", True),
    ({}, 42, "41 or 42", False),
    ({}, 42, "6*7", False),
    ({}, 42, "forty-two", False),
    ({}, 42, "nan", False),
    ({}, 42, "inf", False),
    ({}, 42, "", False),
    ({}, 42, "9" * 600, False),
    ({}, [2, 3], "3", True),
    ({}, [2, 3], "2.5", False),
    ({}, "15%", "15", True),
    ({}, "15%", "0.15", True),
    ({}, 0.15, "15%", True),
    ({}, 15, "15%", False),
    ({}, 3.14, "3.14159", False),
    ({"tolerance": 0.01}, 3.14159, "3.14", True),
    ({"tolerance": 0.01}, 3.14159, "3.1", False),
    ({"tolerance": 0.1}, 10, "11", True),
    ({"tolerance": 0.1}, 10, "11.01", False),
    ({"tolerance": 0.1}, 0, "0.1", True),
    ({"tolerance": 0.1}, 0, "-0.11", False),
    ({"tolerance": 0.1}, -1000, "-900", True),
]
REGEX: list[tuple[dict[str, Any], Any, str, bool]] = [
    ({"pattern": "[0-9]+"}, "1", "123", True),
    ({"pattern": "[0-9]+"}, "1", " 123\n", True),
    ({"pattern": "[0-9]+"}, "1", "123 456", False),
    ({"pattern": "[0-9]+"}, "1", "it is 123", False),
    ({"pattern": "(?i)yes|no"}, "yes", "YES", True),
    ({"pattern": "yes|no"}, "yes", "yes|no", False),
    ({"pattern": "yes|no"}, "yes", "yesno", False),
    ({"pattern": "(?s).*ends"}, "ends", "a\nb ends", True),
    ({"pattern": ".*"}, "1", "x" * 20_001, False),
]
MATHS: list[tuple[dict[str, Any], Any, str, bool]] = [
    ({}, r"\frac{1}{2}", "0.5", True),
    ({}, "(1, 2)", r"\boxed{(1,2)}", True),
    ({}, "(1, 2)", "(2, 1)", False),
    ({}, "1813", r"37\times49", False),
    ({}, ["1", "2"], "2", True),
]
OPTIONS = ["red", "green", "blue"]
CHOICE: list[tuple[dict[str, Any], Any, str, bool]] = [
    ({}, "green", "B", True),
    ({}, "green", "(b)", True),
    ({}, "green", "green", True),
    ({}, "B", "B. green", True),
    ({}, 1, "B", True),
    ({}, "1", "B", True),
    ({}, 0, "B", False),
    ({}, "C", "B or C", False),
    ({}, "C", "B. blue", False),
]


def only_problem(tmp_path: Path, verifier: str, row: dict[str, Any], **settings: Any) -> tuple[Custom, Problem]:
    """The problem of one row, and its task."""
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    columns = {"question": "q", "answer": "a"} | ({"options": "o"} if verifier == "choice" else {})
    made = make_task(Choice(name="custom", path=str(tmp_path), verifier=verifier, columns=columns, **settings))
    assert isinstance(made, Custom)
    [problem] = [p for found in made.data.splits.values() for p in found]
    return made, problem


@pytest.mark.parametrize(
    ("verifier", "settings", "gold", "answer", "right"),
    [
        (verifier, *case)
        for verifier, cases in (
            ("exact", EXACT),
            ("number", NUMBER),
            ("regex", REGEX),
            ("maths", MATHS),
            ("choice", CHOICE),
        )
        for case in cases
    ],
)
def test_verdicts(tmp_path: Path, verifier: str, settings: Any, gold: Any, answer: str, right: bool) -> None:
    task, problem = only_problem(tmp_path, verifier, {"q": "What is it?", "a": gold, "o": OPTIONS}, **settings)
    verdict = task.verify(answer, problem)
    assert verdict.correct is right, verdict.reason
    assert len(verdict.reason) < 300
    assert verdict.grade is None


def test_eight_threads_give_the_same_verdicts_as_one(tmp_path: Path) -> None:
    cases: list[tuple[Custom, str, Problem, bool]] = []
    for verifier, table in (
        ("exact", EXACT),
        ("number", NUMBER),
        ("regex", REGEX),
        ("maths", MATHS),
        ("choice", CHOICE),
    ):
        for settings, gold, answer, right in table:
            folder = tmp_path / str(len(cases))
            folder.mkdir()
            row = {"q": "What is it?", "a": gold, "o": OPTIONS}
            task, problem = only_problem(folder, verifier, row, **settings)
            cases.append((task, answer, problem, right))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda case: case[0].verify(case[1], case[2]), cases * 3))
    assert [verdict.correct for verdict in found] == [right for *_, right in cases] * 3
    assert found[: len(cases)] == found[len(cases) : 2 * len(cases)] == found[2 * len(cases) :]


def test_the_question_decides_about_percent(tmp_path: Path) -> None:
    task, problem = only_problem(tmp_path, "number", {"q": "What percentage is it?", "a": 15})
    assert task.verify("15%", problem).correct
    assert task.verify("15", problem).correct
    assert not task.verify("0.15", problem).correct
