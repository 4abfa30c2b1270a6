"""A user's own rows: columns, splits, verifiers of every kind, and what is said of bad ones."""

from __future__ import annotations

import csv
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data_hub import SHA, FolderHub

from selfroute.config import Choice
from selfroute.errors import ConfigError, DataWarning, TaskError
from selfroute.tasks import make_task, verdicts
from selfroute.tasks.check import check
from selfroute.tasks.columns import Columns, RowError, cells
from selfroute.tasks.custom import Custom, CustomConfig
from selfroute.tasks.verifiers import Exact, Number, Regex, made
from selfroute.types import Problem, Verdict

QA = {"question": "q", "answer": "a"}
ROWS = [{"q": f"What is {n} and {n}?", "a": 2 * n} for n in range(60)]


def task(path: Path, verifier: str = "exact", columns: Mapping[str, Any] = QA, **settings: Any) -> Custom:
    made = make_task(Choice(name="custom", path=str(path), verifier=verifier, columns=columns, **settings))
    assert isinstance(made, Custom)
    return made


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def every(one: Custom) -> list[Problem]:
    return [p for found in one.data.splits.values() for p in found]


def test_the_same_rows_in_every_format_are_the_same_problems(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["q", "a"])
        writer.writeheader()
        writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    read = [task(tmp_path / f"rows.{end}", "number", train=30) for end in ("jsonl", "json", "csv", "parquet")]
    splits = [one.data.splits for one in read]
    assert splits[0] == splits[1] == splits[2] == splits[3]
    assert sum(map(len, splits[0].values())) == len(ROWS)
    assert len(read[0].load("train")) == 30
    assert not any(check(read[0], read[0].load("test")))


def test_a_folder_of_train_and_test_files_is_divided_as_it_says(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:40])
    write(tmp_path / "dev.jsonl", ROWS[50:])
    write(tmp_path / "test.jsonl", ROWS[40:50])
    found = task(tmp_path).data.splits
    assert len(found["test"]) == 10
    assert len(found["train"]) + len(found["calibration"]) == 40
    named = task(tmp_path, parts={"train": "train", "test": "dev"}).data.splits
    # Both our names and those of the config are a part's.
    assert len(named["test"]) == 20
    other = tmp_path / "undivided"
    other.mkdir()
    write(other / "a.jsonl", ROWS[:30])
    write(other / "b.jsonl", ROWS[30:])
    undivided = task(other).data.splits
    assert sum(map(len, undivided.values())) == 60
    assert all(undivided.values())


def test_a_problem_of_two_parts_is_of_the_later_one(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:40])
    write(tmp_path / "validation.jsonl", ROWS[37:50])
    write(tmp_path / "test.jsonl", ROWS[48:])
    with pytest.warns(DataWarning) as warned:
        found = task(tmp_path).data.splits
    asked = {split: {problem.question for problem in problems} for split, problems in found.items()}
    parts = {"train": ROWS[:37], "calibration": ROWS[37:48], "test": ROWS[48:]}
    assert asked == {split: {row["q"] for row in rows} for split, rows in parts.items()}
    assert {str(one.message) for one in warned} == {
        "2 calibration problems are test problems too: they are left out of calibration",
        "3 training problems are calibration problems too: they are left out of training",
    }


def test_a_folder_that_only_sounds_like_a_part_divides_nothing(tmp_path: Path) -> None:
    (tmp_path / "testbed").mkdir()
    write(tmp_path / "testbed/a.jsonl", ROWS)
    assert all(task(tmp_path).data.splits.values())


def test_questions_may_be_templates() -> None:
    columns = Columns(question="{context}\n\n{the prompt} {{x}}")
    row = {"context": "Trees grow.", "the prompt": "What do trees do?", "n": 3}
    assert cells(columns, row)["question"] == "Trees grow.\n\nWhat do trees do? {x}"
    assert cells(Columns(question="n"), row) == {"question": "3"}
    assert cells(Columns(question="context", options=("the prompt", "n")), row)["options"] == ["What do trees do?", "3"]
    for value in (None, [], {}, float("nan")):
        with pytest.raises(RowError, match="n must be text or a number, not"):
            cells(Columns(question="{n}?"), {"n": value})
    with pytest.raises(RowError, match="there is no question in it"):
        cells(Columns(question="n"), {"n": " "})


@given(st.dictionaries(st.text(max_size=3), st.none() | st.text() | st.integers() | st.floats()), st.text())
def test_any_template_and_any_row_give_a_question_or_say_why(row: dict[str, Any], question: str) -> None:
    # A bad template is a ValueError, as a bad row is.
    with suppress(ValueError):
        assert cells(Columns(question=question), row)["question"].strip()


def test_all_bad_rows_are_named_at_once_with_file_line_and_column(tmp_path: Path) -> None:
    rows = [{"q": "one?", "a": "1"}, {"q": "two?"}, {"q": "three?", "a": None}, {"q": " ", "a": "4"}, {"q": 5, "a": []}]
    with pytest.raises(TaskError) as raised:
        task(write(tmp_path / "mine.jsonl", [*rows, "six"])).load("test")
    assert str(raised.value).splitlines() == [
        "5 bad rows:",
        "  mine.jsonl:2: a: no such column (task.columns.answer); there is q",
        "  mine.jsonl:3: a must be text or a number, not missing",
        "  mine.jsonl:4: q: there is no question in it",
        "  mine.jsonl:5: a is an empty list",
        "  mine.jsonl:6: must be an object with columns, not str",
    ]


@pytest.mark.parametrize(
    ("verifier", "columns", "row", "fault"),
    [
        ("number", {}, {"a": "twelve"}, "a must be a number, not 'twelve'"),
        ("exact", {}, {"a": ["x", {}]}, "a must be text or a number, not {}"),
        ("exact", {}, {"a": "x" * 20_001}, "a is longer than 20,000 characters"),
        ("choice", {"options": "o"}, {"a": "A", "o": "['x', 'y']"}, "o is not JSON: "),
        ("choice", {"options": "o"}, {"a": "A", "o": ["x"]}, "o must be a list of 2 to 26 texts, not "),
        ("choice", {"options": "o"}, {"a": "E", "o": ["x", "y"]}, "its letter or its place from 0, not 'E'"),
        ("choice", {"options": "o"}, {"a": "1", "o": ["1", "2"]}, "a is '1', which is one option's text and another"),
        ("choice", {"options": ["x", "y"]}, {"a": "A", "x": "1"}, "y: no such column (task.columns.options); there"),
        ("regex", {"pattern": "p"}, {"a": "1", "p": "(1"}, "p is not a pattern: missing )"),
        ("code", {"cases": "c"}, {"a": "", "c": '{"inputs": [1]}'}, "c must hold as many outputs as inputs"),
        ("code", {"tests": "t"}, {"a": "", "t": '"assert f()"'}, "t must be a list of texts"),
        (
            "code",
            {"tests": "t"},
            {"a": "", "t": ["assert pow(2, 3) == 8"]},
            "but for pow, which Python or an import has, too: give a solution in a that",
        ),
    ],
)
def test_what_a_verifier_cannot_use_is_a_bad_row(
    tmp_path: Path, verifier: str, columns: dict[str, Any], row: dict[str, Any], fault: str
) -> None:
    path = write(tmp_path / "mine.jsonl", [{"q": "What?", **row}])
    with pytest.raises(TaskError) as raised:
        _ = task(path, verifier, QA | columns).data.splits
    assert str(raised.value).startswith("1 bad row:\n  mine.jsonl:1: ")
    assert fault in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"path": None}, "say where the problems are"),
        (
            {"verifier": "near"},
            "verifier is one of exact, number, regex, choice, maths, code, or package.module:function",
        ),
        ({"verifier": "mine:"}, "verifier is one of"),
        ({"verifier": "choice"}, r"verifier choice needs columns\.options"),
        ({"columns": {"question": "q"}}, r"verifier exact needs columns\.answer"),
        ({"verifier": "regex"}, r"verifier regex needs a pattern for all rows, or columns\.pattern"),
        ({"verifier": "regex", "pattern": "("}, "pattern is not a pattern"),
        ({"verifier": "code"}, r"verifier code needs one of columns\.cases and columns\.tests"),
        ({"columns": {"question": "{q", "answer": "a"}}, "not a template"),
        ({"columns": {"question": "{q.x!r}", "answer": "a"}}, "braces hold a column's name and nothing else"),
        ({"columns": {"questions": "q", "answer": "a"}}, r"columns\.questions: Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_work_are_refused(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_task(Choice(**{"name": "custom", "path": "x.jsonl", "verifier": "exact", "columns": QA} | changed))


def test_a_hub_data_set_is_described_where_it_cannot_be_reached() -> None:
    choice = Choice(name="custom", hub="org/mine", parts={"test": "validation"}, verifier="exact", columns=QA)
    with pytest.raises(TaskError, match=r"org/mine \(config default, split validation, revision newest\)"):
        make_task(choice).load("test")


HUB = """
from selfroute.config import Choice
from selfroute.tasks import make_task
columns, parts = {"question": "q", "answer": "a"}, {"train": "train", "test": "validation"}
task = make_task(Choice(name="custom", hub="org/mine", parts=parts, verifier="exact", columns=columns))
print([(p.question, task.solution(p)) for p in task.load("test")])
print(len(task.load("train")), task.data.sources[0]["commit"])
"""


def test_a_hub_data_set_is_read_by_the_names_of_its_splits(tmp_path: Path) -> None:
    (tmp_path / "hub/org/mine").mkdir(parents=True)
    write(tmp_path / "hub/org/mine/train.jsonl", ROWS[:20])
    write(tmp_path / "hub/org/mine/validation.jsonl", ROWS[20:21])
    with FolderHub(tmp_path / "hub") as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", HUB], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["[('What is 20 and 20?', '40')]", f"20 {SHA}"]


def test_options_are_shown_by_letter_and_answered_by_letter_or_text(tmp_path: Path) -> None:
    rows = [{"q": "Which is red?", "a": "blood", "o": json.dumps(["grass", "blood"])}]
    one = task(write(tmp_path / "mine.jsonl", rows), "choice", QA | {"options": "o"})
    [problem] = every(one)
    assert problem.question.startswith("Which is red?\n\nA. grass\nB. blood\n\n")
    assert one.solution(problem) == "B"
    rows = [{"q": "How many?", "a": 1, "o": [1, 2]}]
    for how, letter in (("text", "A"), ("place", "B")):
        one = task(write(tmp_path / "mine.jsonl", rows), "choice", QA | {"options": "o"}, answer_is=how)
        assert one.solution(*every(one)) == letter
    asked = one.read("Which is green?\nA. grass\nB. blood")
    assert one.verify("A", asked) == Verdict(False, "no reference answer is known", extracted="A", judged=False)


def test_programs_run_on_cases_and_on_asserts(tmp_path: Path, sandbox: object) -> None:
    cases = [
        {"q": "Print the double of a number.", "a": "print(2 * int(input()))", "c": {"inputs": ["2"], "outputs": ["4"]}}
    ]
    script = task(write(tmp_path / "cases.jsonl", cases), "code", QA | {"cases": "c"})
    asserts = [
        {
            "q": "Write double(n).",
            "a": "def double(n): return 2 * n",
            "t": ["assert double(2) == 4", "assert double(3) == 6"],
        }
    ]
    function = task(write(tmp_path / "asserts.jsonl", asserts), "code", QA | {"tests": "t"})
    for one, wrong in ((script, "print(5)"), (function, "def double(n): return 4")):
        [problem] = every(one)
        solution = one.solution(problem)
        assert solution is not None
        found = verdicts(one, [(solution, problem), (wrong, problem), ("", one.read("Any program."))])
        assert [v.correct for v in found] == [True, False, False]


def test_a_pattern_that_would_take_for_ever_is_cut_off(tmp_path: Path) -> None:
    rows = [{"q": "What?", "p": "(a+)+b"}]
    one = task(write(tmp_path / "mine.jsonl", rows), "regex", {"question": "q", "pattern": "p"}, time_limit_s=0.2)
    [problem] = every(one)
    assert one.verify("aab", problem).correct
    started = time.monotonic()
    verdict = one.verify("a" * 5000, problem)
    assert not verdict.correct
    assert verdict.reason == "the pattern '(a+)+b': undecided after 0.2 s"
    assert time.monotonic() - started < 5
    assert one.verify("ab", problem).correct


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text("0123456789.,eE-+%/\\{}^frac boxed", max_size=400))
def test_verifiers_take_any_text(answer: str) -> None:
    problem = made("What?", {"answers": ("12.5%",), "pattern": "[0-9.%]+"})
    config = CustomConfig(path="x", verifier="exact", columns=Columns(**QA), tolerance=0.1)
    for verifier in (Exact(config), Number(config), Regex(config)):
        assert isinstance(verifier.verify(answer, problem), Verdict)
        assert isinstance(verifier.canonical(answer), str)


@pytest.mark.parametrize(
    "answer", ["9" * 10**6, "\\boxed{" * 10**5, "{" * 19_000, "1/" * 9000, "\udcff" * 5000, "1,000" * 3000]
)
def test_hostile_answers_are_wrong_at_once(answer: str) -> None:
    config = CustomConfig(path="x", verifier="number", columns=Columns(**QA))
    problem = made("What?", {"answers": ("1",), "pattern": "(x+x+)+y"})
    # The start of a worker does not count.
    Regex(config).verify("", problem)
    started = time.monotonic()
    for verifier in (Exact(config), Number(config), Regex(config)):
        assert not verifier.verify(answer, problem).correct
        verifier.canonical(answer)
    assert time.monotonic() - started < 5


FUNCTIONS = """
import os, time, datetime

def says(answer, row):
    if answer == "raise":
        raise KeyError("no such key")
    if answer == "hang":
        time.sleep(60)
    if answer == "die":
        os._exit(3)
    return {"true": True, "half": 0.5, "why": (True, "because"), "graded": (0.75, "nearly"), "two": 2, "none": None,
            "object": datetime, "nan": float("nan"), "date": row["day"] == "2024-01-02", "gold": row["a"] == 3}[answer]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Custom:
    (tmp_path / "judged_here.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    rows = [{"q": "What?", "a": 3, "day": datetime.date(2024, 1, 2)}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine.parquet")
    return task(tmp_path / "mine.parquet", "judged_here:says", {"question": "q"}, pass_score=0.6, time_limit_s=2)


def test_a_function_of_the_current_directory_judges(own: Custom) -> None:
    [problem] = every(own)
    assert own.pass_score == 0.6
    assert own.verify("true", problem) == Verdict(True, "judged_here:says says True", extracted="true")
    assert own.verify("half", problem) == Verdict(False, "judged_here:says says 0.5", 0.5, extracted="half")
    assert own.verify("why", problem) == Verdict(True, "because", extracted="why")
    assert own.verify("graded", problem) == Verdict(True, "nearly", 0.75, extracted="graded")
    # What JSON cannot hold is text.
    assert own.verify("date", problem).correct
    assert own.verify("gold", problem).correct
    assert own.solution(problem) is None
    asked = own.read("Something else?")
    assert own.verify("true", asked) == Verdict(False, "no reference answer is known", extracted="true", judged=False)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("raise", "failed on the answer 'raise': KeyError: 'no such key'"),
        ("die", "failed on the answer 'die': the worker died of it"),
        ("two", "must return True, False, a grade from 0 to 1, or one of them and a reason; it gave 2"),
        ("none", "it gave None"),
        ("nan", "it gave nan"),
        ("object", "failed on the answer 'object': TypeError: Object of type module is not JSON serializable"),
    ],
)
def test_a_function_that_fails_is_an_error_that_names_the_row(own: Custom, answer: str, fault: str) -> None:
    [problem] = every(own)
    with pytest.raises(TaskError) as raised:
        own.verify(answer, problem)
    assert str(raised.value).startswith("mine.parquet:1: judged_here:says ")
    assert fault in str(raised.value)
    # One failure costs no other verdict.
    assert own.verify("true", problem).correct


def test_a_function_that_hangs_is_an_error(tmp_path: Path, own: Custom) -> None:
    one = task(tmp_path / "mine.parquet", "judged_here:says", {"question": "q"}, time_limit_s=0.1)
    [problem] = every(one)
    with pytest.raises(TaskError, match=r"failed on the answer 'hang': undecided after 0\.1 s"):
        one.verify("hang", problem)


def test_a_function_that_is_not_there_is_found_out_when_problems_are_loaded(own: Custom, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    for path, fault in (
        ("judged_nowhere:says", "No module named 'judged_nowhere'"),
        ("judged_here:x", "no attribute 'x'"),
    ):
        with pytest.raises(TaskError, match=f"task.verifier: .*{fault}.* current directory, {tmp_path}"):
            task(tmp_path / "rows.jsonl", path).load("test")
