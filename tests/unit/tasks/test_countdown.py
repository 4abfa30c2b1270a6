from __future__ import annotations

import contextlib
import datetime
import json
import math
import random
import time
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfroute.config import Choice
from selfroute.errors import ConfigError, TaskError
from selfroute.tasks import make_task
from selfroute.tasks.countdown import (
    Countdown,
    CountdownConfig,
    problem,
    read_question,
    solve,
    split_of,
    verify,
)
from selfroute.tasks.files import read_rows


@pytest.mark.parametrize("k", [3, 4, 5, 6])
def test_every_generated_problem_is_in_range_and_solvable(k: int) -> None:
    config = CountdownConfig(num_numbers=k, number_max=12, train=40, calibration=5, test=5, seed=3)
    for p in Countdown(config).load("train")[:15]:
        numbers, target = p.reference["numbers"], p.reference["target"]
        assert len(numbers) == k
        assert all(1 <= n <= 12 for n in numbers)
        assert 10 <= target <= 99
        expression = solve(numbers, target)
        assert expression is not None
        assert verify(expression, numbers, target).correct


def test_splits_are_disjoint_full_and_seeded() -> None:
    task = Countdown(CountdownConfig())
    splits = {name: task.load(name) for name in ("train", "calibration", "test")}
    assert [len(s) for s in splits.values()] == [5000, 500, 1000]
    keys = {n: {(*sorted(p.reference["numbers"]), p.reference["target"]) for p in s} for n, s in splits.items()}
    assert [len(k) for k in keys.values()] == [5000, 500, 1000]
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["calibration"]
    assert not keys["calibration"] & keys["test"]
    assert Countdown(CountdownConfig()).load("test") == splits["test"]
    # Another seed draws others, but never across the border.
    other = {(*sorted(p.reference["numbers"]), p.reference["target"]) for p in
             Countdown(CountdownConfig(seed=1)).load("train")}  # fmt: skip
    assert other != keys["train"]
    assert not other & keys["test"]


def test_the_split_ignores_the_order_of_numbers() -> None:
    assert split_of([3, 7, 25], 46) == split_of([25, 3, 7], 46)
    assert problem([3, 7, 25], 46).id == problem([7, 25, 3], 46).id


def test_too_many_problems_is_an_error() -> None:
    with pytest.raises(TaskError, match=r"only \d+ distinct test problems"):
        Countdown(CountdownConfig(number_max=2, train=5, calibration=5, test=500)).load("test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_numbers": 2}, "3 to 6"),
        ({"num_numbers": 7}, "3 to 6"),
        ({"number_min": 9, "number_max": 3}, "number_min"),
        ({"target_min": 50, "target_max": 10}, "target_min"),
        ({"train": 0}, "train"),
        ({"test": 0}, "test"),
        ({"nubmer_max": 3}, "nubmer_max"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(Choice(name="countdown", **settings))


@pytest.mark.parametrize(
    ("expression", "numbers", "target"),
    [
        ("3*7+25", [3, 7, 25], 46),
        (" ( 3 * 7 ) + 25 ", [3, 7, 25], 46),
        ("25-(7-3)", [3, 7, 25], 21),
        ("8/(3-8/3)", [3, 3, 8, 8], 24),
        ("((((1+2))))*3", [1, 2, 3], 9),
        ("10-2-3", [2, 3, 10], 5),
        ("12/2/3", [2, 3, 12], 2),
        ("0+5*1", [0, 5, 1], 5),
    ],
)
def test_right_expressions(expression: str, numbers: list[int], target: int) -> None:
    assert verify(expression, numbers, target).correct


HOSTILE = [
    "9**9**9",
    "3**7+25",
    "3*7//25",
    "__import__('os').system('true')",
    "\u0663*7+25",
    "\uff13*7+25",
    "3\u00d77+25",
    "1e9",
    "3e0*7+25",
    "03*7+25",
    "3*07+25",
    "3.0*7+25",
    "--3*7+25",
    "-3*7+25",
    "+3*7+25",
    "3*7+25=46",
    "3*7+2 5",
    "3_*7+25",
    "0x3*7+25",
    "3*7+25;",
    "3 7 25",
    "3*(7+25",
    "3*7)+25",
    ")3*7+25(",
    "()3*7+25",
    "3*7+25()",
    "3(7)+25",
    "(3*7)25",
    "3*7+25+",
    "*3*7+25",
    "3*/7+25",
    "3/(7-7)+25",
    "25/(3-3)*7",
    "3*7",
    "3*7+25+0",
    "3*7+25+3-3",
    "",
    " ",
    "\x00",
    "(" * 10_000 + "3*7+25" + ")" * 10_000,
    "(" * 10_000,
    "3*7+25" + " " * 100_000,
    "1+" * 50_000 + "1",
    "9" * 100_000,
    "3*7+25\u2028",
    "nan",
    "\ud800",
]


@pytest.mark.parametrize("expression", HOSTILE, ids=lambda e: ascii(e[:24]))
def test_hostile_expressions_are_wrong_fast_and_never_raise(expression: str) -> None:
    started = time.process_time()
    verdict = verify(expression, [3, 7, 25], 46)
    elapsed = time.process_time() - started
    assert not verdict.correct
    assert verdict.reason
    assert elapsed < 1e-3 * max(1, len(expression) / 1000) + 1e-3


def test_division_by_zero_is_wrong_with_the_right_numbers() -> None:
    assert verify("25/(3-3)", [3, 3, 25], 46).reason == "divides by zero"


@st.composite
def expressions(draw: st.DrawFn) -> tuple[str, list[int], Fraction | None]:
    """An expression with stray parentheses and spaces, its numbers, and its value (None: it divides by zero)."""

    def build(depth: int) -> tuple[str, list[int], Fraction | None]:
        if depth == 0 or draw(st.booleans()):
            n = draw(st.integers(0, 30))
            text, numbers, value = str(n), [n], Fraction(n)
        else:
            (a, left, x), (b, right, y) = build(depth - 1), build(depth - 1)
            op = draw(st.sampled_from("+-*/"))
            text, numbers = f"({a}{op}{b})", left + right
            broken = x is None or y is None or (op == "/" and y == 0)
            value = None if broken else eval("x" + op + "y", {"x": x, "y": y})
        if draw(st.booleans()):
            text = f"({text} )"
        return text, numbers, value

    return build(3)


@given(expressions(), st.integers(-3, 3))
def test_verify_agrees_with_exact_arithmetic(expression: tuple[str, list[int], Fraction | None], off: int) -> None:
    text, numbers, value = expression
    if value is None:
        assert verify(text, numbers, 7).reason == "divides by zero"
        return
    # Targets that are no whole number cannot be asked for, and are never met.
    target = math.floor(value) + off
    assert verify(text, numbers, target).correct == (value == target)
    assert not verify(text, [*numbers, 1], target).correct


@given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(0, 20)), min_size=1, max_size=5), st.integers(0, 20))
def test_verify_knows_precedence(rest: list[tuple[str, int]], first: int) -> None:
    text = str(first) + "".join(f"{op}{n}" for op, n in rest)
    try:
        value = eval("".join([f"F({first})", *(f"{op}F({n})" for op, n in rest)]), {"F": Fraction})
    except ZeroDivisionError:
        value = None
    target = 0 if value is None else math.floor(value)
    assert verify(text, [first, *(n for _, n in rest)], target).correct == (value == target)


@given(st.text())
def test_verify_is_total(text: str) -> None:
    assert verify(text, [3, 7, 25], 46).reason


def test_questions_read_back() -> None:
    assert read_question(problem([3, 7, 25], 46).question) == ((3, 7, 25), 46)
    assert read_question("What is the capital of France?") is None


@pytest.mark.parametrize(
    "text",
    [
        "numbers 3, 7, 25; target 46",
        "3 7 25 46",
        "[3,7,25] -> 46",
        "make 46 from 3, 7 and 25",
        "Target: 46, numbers: 3 7 25",
    ],
)
def test_a_users_own_words(text: str) -> None:
    assert Countdown(CountdownConfig()).read(text) == problem([3, 7, 25], 46)


@pytest.mark.parametrize(
    "text", ["", "numbers 3, 7", "1 2 3 4 5 6 7 8 9", "1.5, 3, 7; 46", "-3, 7, 25; 46", "1234567890 3 7 5"]
)
def test_a_users_unreadable_words(text: str) -> None:
    with pytest.raises(TaskError, match="3 to 6 whole numbers"):
        Countdown(CountdownConfig()).read(text)


ROWS = [{"nums": [a, b, 9], "target": a + b + 9} for a in range(1, 30) for b in range(1, 30)]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_public_layout_loads_and_is_split_by_hash(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", ROWS)
    task = Countdown(CountdownConfig(path=str(path), train=200, calibration=20, test=30))
    train, test = task.load("train"), task.load("test")
    assert (len(train), len(test)) == (200, 30)
    assert not {p.id for p in train} & {p.id for p in test}
    assert all(split_of(p.reference["numbers"], p.reference["target"]) == "test" for p in test)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"nums": [1, 2], "target": "x"}\n', "data.jsonl:1: `target` must be a whole number"),
        ('\n{"nums": "abc", "target": 3}\n', "data.jsonl:2: `nums` must be"),
        ('{"nums": [1, true, 2], "target": 3}\n', "`nums` must be"),
        ('{"target": 3}\nnot json\n', "2 bad rows"),
        ("[" * 100_000, "1 bad row"),
        ('{"nums": [1, 2, 3], "target": 7}\n', "holds no train problem"),
        ('{"nums": [1, 2, 3], "target": 6}\n{broken\n', "data.jsonl:2: is not JSON: Expecting"),
    ],
)
def test_bad_rows_are_all_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(TaskError, match=message):
        Countdown(CountdownConfig(path=str(path))).load("train")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "data.csv").write_text("nums,target\n")
    for name, message in (
        ("data.parquet", "as Parquet"),
        ("data.csv", "give a .jsonl"),
        ("none.jsonl", "no such file"),
    ):
        with pytest.raises(TaskError, match=message):
            Countdown(CountdownConfig(path=str(tmp_path / name))).load("train")
    pq.write_table(pa.table({"numbers": [[1, 2, 3]]}), tmp_path / "other.parquet")
    with pytest.raises(TaskError, match="no column nums and target"):
        Countdown(CountdownConfig(path=str(tmp_path / "other.parquet"))).load("train")
    days = pa.array([[datetime.date(2020, 1, 1)]], pa.list_(pa.date32()))
    for nums, target, message in (
        (days, [3], "'nums' must hold a list of integers, not list<"),
        ([[1, 2, 3]], ["6"], "'target' must hold integers, not string"),
        ([[1, 2, 3]], pa.array([6], pa.timestamp("ns")), "'target' must hold integers, not timestamp"),
    ):
        pq.write_table(pa.table({"nums": nums, "target": target}), tmp_path / "typed.parquet")
        with pytest.raises(TaskError, match=message):
            Countdown(CountdownConfig(path=str(tmp_path / "typed.parquet"))).load("train")


def test_a_damaged_parquet_file_is_an_error_or_reads(tmp_path: Path) -> None:
    whole = bytearray(write(tmp_path / "whole.parquet", ROWS).read_bytes())
    rng = random.Random(0)
    path = tmp_path / "damaged.parquet"
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(TaskError):
            assert Countdown(CountdownConfig(path=str(path))).load("train")


def test_a_set_of_the_papers_size_is_used_as_it_is(tmp_path: Path) -> None:
    """6,000 rows with the default counts: each split takes what it finds, up to its number."""
    rows = [{"nums": [a, b, 9], "target": a * b + 9} for a in range(1, 76) for b in range(76, 156)]
    task = Countdown(CountdownConfig(path=str(write(tmp_path / "data.jsonl", rows))))
    sizes = {split: len(task.load(split)) for split in ("train", "calibration", "test")}
    assert sizes["train"] == pytest.approx(4800, abs=100)
    assert sizes["calibration"] == pytest.approx(480, abs=60)
    assert sizes["test"] == pytest.approx(720, abs=80)


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"nums": [1, 2, 3], "target": 6}\n', encoding="utf-8-sig")
    assert len(list(read_rows(path))) == 1
