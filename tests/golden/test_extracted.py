"""What each verifier takes for the answer, and that a verdict stays small whatever the answer is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfroute.config import Choice
from selfroute.tasks import Task, make_task
from selfroute.tasks.code import Code
from selfroute.types import VERDICT_CHARS, Problem, Verdict
from tests.programs import code_task, problems

MATHS = Problem("maths-1", "What is a half?", {"answers": (r"\frac{1}{2}",)})
CHOICE = Problem("choice-1", "Which?", {"options": ("grass", "blood"), "right": 1})
COUNTDOWN = Problem("countdown-1", "Make 46.", {"numbers": (3, 7, 25), "target": 46})
ADDITION = Problem("addition-1", "Add.", {"numbers": (5, 7), "sum": 12})
MEGABYTE = "x" * (1 << 20)


@pytest.mark.parametrize(
    ("name", "problem", "answer", "extracted"),
    [
        ("countdown", COUNTDOWN, " 3*7 + 25\n", "3*7+25"),
        ("countdown", COUNTDOWN, "7+", "7+"),
        ("countdown", COUNTDOWN, "It is 46.", ""),
        ("addition", ADDITION, " 12 ", "12"),
        ("addition", ADDITION, "twelve", ""),
        ("maths", MATHS, r"So \boxed{3}, no: \boxed{\dfrac12 }.", r"\dfrac12"),
        ("maths", MATHS, r"\frac12", r"\frac12"),
        ("maths", MATHS, r"\boxed{", ""),
        ("choice", CHOICE, r"The answer is \boxed{\text{blood}}.", "B"),
        ("choice", CHOICE, "(a)", "A"),
        ("choice", CHOICE, "A or B", ""),
    ],
)
def test_what_is_extracted(name: str, problem: Problem, answer: str, extracted: str) -> None:
    task = make_task(Choice(name=name))
    assert task.verify(answer, problem).extracted == extracted
    assert task.verify(MEGABYTE, problem).extracted == ""


@pytest.mark.parametrize(
    ("verifier", "settings", "answer", "extracted"),
    [
        ("exact", {}, " The  END ", "the end"),
        ("exact", {"ignore": []}, "END", "END"),
        ("number", {}, r"About \boxed{1,234}.", "1,234"),
        ("number", {}, "many", ""),
        ("regex", {"pattern": ".*"}, " yes\n", "yes"),
    ],
)
def test_what_is_extracted_for_rows_of_ones_own(
    tmp_path: Path, verifier: str, settings: dict[str, Any], answer: str, extracted: str
) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"q": "What?", "a": "7"}) + "\n")
    columns = {"question": "q", "answer": "a"}
    task: Task = make_task(
        Choice(name="custom", path=str(tmp_path / "mine.jsonl"), verifier=verifier, columns=columns, **settings)
    )
    problem = Problem("custom-1", "What?", {"answers": ("7",), "pattern": settings.get("pattern")})
    assert task.verify(answer, problem).extracted == extracted
    assert task.verify(MEGABYTE, problem).extracted == ""


def test_of_an_answer_with_a_program_it_is_the_program(tmp_path: Path, sandbox: object) -> None:
    task: Code = code_task(tmp_path)
    problem = problems(tmp_path)["sum"]
    program = "print(sum(map(int, input().split())))\n"
    assert task.verify(f"It adds.\n```python\n{program}```\nDone.", problem).extracted == program
    assert task.verify("", problem).extracted == ""
    long = task.verify(f"{program}# {MEGABYTE}", problem)
    assert (long.correct, len(long.extracted)) == (False, VERDICT_CHARS)


def test_a_verdict_is_small_whatever_it_is_of() -> None:
    verdict = Verdict(False, MEGABYTE, extracted=f"begins {MEGABYTE}")
    assert len(verdict.reason) == len(verdict.extracted) == VERDICT_CHARS
    assert verdict.extracted.startswith("begins x")
    assert verdict.extracted.endswith("x…")
    assert Verdict(True, "x" * VERDICT_CHARS).reason == "x" * VERDICT_CHARS
