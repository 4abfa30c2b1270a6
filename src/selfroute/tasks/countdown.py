"""Countdown: make a target from given numbers, each used exactly once, with + - * / and parentheses.

Holds the generator, the verifier, the exact solver and the loader of the public column layout (`nums`, `target`).
Left out on purpose: how a device model searches (that is the warm start's), and partial credit.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from selfroute.config import Config
from selfroute.errors import TaskError
from selfroute.types import Problem, Split, Verdict


class CountdownConfig(Config):
    """Which Countdown problems there are, and how many."""

    num_numbers: int = 3
    """Numbers a problem gives (3 to 6)."""
    number_min: int = 1
    """Smallest number."""
    number_max: int = 20
    """Largest number."""
    target_min: int = 10
    """Smallest target."""
    target_max: int = 99
    """Largest target."""
    train: int = Field(5000, ge=1)
    """Training problems; with `path`, at most."""
    calibration: int = Field(500, ge=1)
    """Calibration problems; with `path`, at most."""
    test: int = Field(1000, ge=1)
    """Test problems; with `path`, at most."""
    seed: int = 0
    """Seed of the generator; not used with `path`."""
    path: str | None = None
    """A .jsonl or .parquet file with columns `nums` and `target`, used in place of the generator."""

    @model_validator(mode="after")
    def _ranges(self) -> CountdownConfig:
        if not 3 <= self.num_numbers <= 6:
            raise ValueError("num_numbers must be 3 to 6")
        if not 1 <= self.number_min <= self.number_max:
            raise ValueError("need 1 <= number_min <= number_max")
        if not 1 <= self.target_min <= self.target_max:
            raise ValueError("need 1 <= target_min <= target_max")
        return self


class Countdown:
    """The task: `load` gives the problems of a split, `verify` judges an answer, `read` takes a user's own words."""

    Config = CountdownConfig

    def __init__(self, config: CountdownConfig) -> None:
        self.config = config

    def load(self, split: Split) -> list[Problem]:
        """The problems of a split: generated, or read from `path`; splits never share (sorted numbers, target).

        A file gives what it has for a split, up to the number asked for.

        Raises:
            TaskError: the file is missing or holds bad rows or none of the split, or too few distinct problems were
                found in the generator's range.
        """
        sizes = {"train": self.config.train, "calibration": self.config.calibration, "test": self.config.test}
        wanted = sizes[split]
        source = read_rows(Path(self.config.path)) if self.config.path else self._generate()
        problems: dict[str, Problem] = {}
        for numbers, target in source:
            if len(problems) >= wanted:
                break
            if split_of(numbers, target) == split:
                new = problem(numbers, target)
                problems.setdefault(new.id, new)
        if self.config.path and not problems:
            raise TaskError(
                f"{self.config.path} holds no {split} problem (a hash of each problem decides its split, 80 % train, "
                "8 % calibration, 12 % test): give a larger file"
            )
        if not self.config.path and len(problems) < wanted:
            raise TaskError(
                f"only {len(problems)} distinct {split} problems were found, {wanted} were asked for: widen the number "
                f"or target range, or ask for fewer (task.{split}=N)"
            )
        return list(problems.values())

    def _generate(self) -> Iterator[tuple[tuple[int, ...], int]]:
        # Problems are drawn as random expressions, so each is solvable. The draws are bounded: where the ranges hold
        # too few problems, or targets that expressions rarely make, `load` says so.
        c = self.config
        rng = random.Random(f"countdown-{c.seed}")
        for _ in range(200 * (c.train + c.calibration + c.test) + 1000):
            numbers = tuple(rng.randint(c.number_min, c.number_max) for _ in range(c.num_numbers))
            target = random_value(numbers, rng)
            if target is not None and c.target_min <= target <= c.target_max:
                yield numbers, target

    def verify(self, answer: str, problem: Problem) -> Verdict:
        """Whether `answer` makes the target from exactly the given numbers."""
        return verify(answer, problem.reference["numbers"], problem.reference["target"])

    def read(self, text: str) -> Problem:
        """A problem in a user's own words, such as `numbers 3, 7, 25; target 46` or `make 46 from 3, 7 and 25`.

        The target is the number after `target` or `make`; without such a word, the last one.

        Raises:
            TaskError: the text does not hold three to six numbers and a target.
        """
        number = r"[-+]?[0-9.]*[0-9]"
        named = re.search(rf"\b(?:target|make)\b[ :=]*(?:is |of )?({number})", text, re.IGNORECASE)
        last = f"{text[: named.start(1)]} {text[named.end(1) :]} {named[1]}" if named else text
        found = re.findall(number, last)
        if not 4 <= len(found) <= 7 or not all(re.fullmatch(r"[0-9]{1,9}", n) for n in found):
            raise TaskError(
                f'need 3 to 6 whole numbers and a target, such as "numbers 3, 7, 25; target 46"; got {text!r:.200}'
            )
        numbers = [int(n) for n in found]
        return problem(numbers[:-1], numbers[-1])


def problem(numbers: Sequence[int], target: int) -> Problem:
    """The problem of some numbers and a target, its id the hash that also decides its split."""
    listed = ", ".join(map(str, numbers))
    return Problem(
        id=f"countdown-{_hash(numbers, target):016x}",
        question=f"Use each of the numbers {listed} exactly once with + - * / and parentheses to make {target}.",
        reference={"numbers": tuple(numbers), "target": target},
    )


_QUESTION = re.compile(r"numbers ([0-9, ]{1,80}) exactly once with .{1,60} to make ([0-9]{1,9})\.")


def read_question(text: str) -> tuple[tuple[int, ...], int] | None:
    """Numbers and target of a question that `problem` wrote, or None."""
    match = _QUESTION.search(text)
    if match is None:
        return None
    return tuple(int(n) for n in match[1].split(",")), int(match[2])


def split_of(numbers: Sequence[int], target: int) -> Split:
    """The split that a problem belongs to for ever, whatever file or seed it came from.

    By hash of (sorted numbers, target): 80 % train, 8 % calibration, 12 % test.
    """
    share = _hash(numbers, target) % 100
    return "train" if share < 80 else "calibration" if share < 88 else "test"


def _hash(numbers: Sequence[int], target: int) -> int:
    text = json.dumps([sorted(numbers), target])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def random_value(numbers: Sequence[int], rng: random.Random) -> int | None:
    """The value of a random expression over all numbers with whole, non-negative steps; None if it got stuck."""
    left = list(numbers)
    while len(left) > 1:
        rng.shuffle(left)
        a, b = left.pop(), left.pop()
        op = rng.choice("+-*/")
        if (op == "-" and a < b) or (op == "/" and (b == 0 or a % b)):
            return None
        left.append(apply(a, op, b))
    return left[0]


def apply(a: int, op: str, b: int) -> int:
    """One whole-number step; the caller has checked that a division is exact."""
    return a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a // b


# An honest answer for six numbers is under 60 characters; the limit keeps hostile input cheap.
MAX_ANSWER_CHARS = 500
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def verify(answer: str, numbers: Sequence[int], target: int) -> Verdict:
    """Judge an expression by exact rational arithmetic, without `eval`. Total: it never raises, on any text.

    >>> verify("(3*7)+25", [3, 7, 25], 46).correct
    True
    >>> verify("3*7+25", [3, 7, 7, 25], 46).reason
    'uses the numbers [3, 7, 25], not [3, 7, 7, 25]'
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict(False, f"longer than {MAX_ANSWER_CHARS} characters")
    if not answer.isascii():
        return Verdict(False, "has a character outside 0-9 + - * / ( )")
    compact = "".join(answer.split())
    tokens = _TOKEN.findall(compact)
    # Spaces inside a number would vanish: "1 2" must not read as 12.
    if sum(map(len, tokens)) != len(compact) or re.search(r"[0-9]\s+[0-9]", answer):
        return Verdict(False, "has a character outside 0-9 + - * / ( )")
    literals = [t for t in tokens if t.isdigit()]
    if any(len(t) > 1 and t[0] == "0" for t in literals):
        return Verdict(False, "a number has leading zeros")
    if any(len(t) > 12 for t in literals):
        return Verdict(False, "a number is too long")
    used = [int(t) for t in literals]
    if Counter(used) != Counter(numbers):
        return Verdict(False, f"uses the numbers {sorted(used)}, not {sorted(numbers)}")
    try:
        value = _evaluate(tokens)
    except (_MalformedError, ZeroDivisionError) as error:
        return Verdict(False, str(error) if isinstance(error, _MalformedError) else "divides by zero")
    return Verdict(value == target, f"makes {value}" + ("" if value == target else f", not {target}"))


class _MalformedError(Exception):
    pass


def _evaluate(tokens: Sequence[str]) -> Fraction:
    """The value of infix tokens by two stacks: no recursion, so nesting cannot overflow."""
    values: list[Fraction] = []
    operators: list[str] = []

    def reduce() -> None:
        op, b, a = operators.pop(), values.pop(), values.pop()
        values.append(a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b)

    operand_next = True
    for token in tokens:
        if token.isdigit():
            if not operand_next:
                raise _MalformedError("two numbers stand side by side")
            values.append(Fraction(int(token)))
            operand_next = False
        elif token == "(":
            if not operand_next:
                raise _MalformedError("an operator is missing before a parenthesis")
            operators.append(token)
        elif operand_next:
            raise _MalformedError(f"a number is missing before {token!r}")
        elif token == ")":
            while operators and operators[-1] != "(":
                reduce()
            if not operators:
                raise _MalformedError("unbalanced parentheses")
            operators.pop()
        else:
            while operators and operators[-1] != "(" and _PRECEDENCE[operators[-1]] >= _PRECEDENCE[token]:
                reduce()
            operators.append(token)
            operand_next = True
    if operand_next:
        raise _MalformedError("the expression ends too early")
    while operators:
        if operators[-1] == "(":
            raise _MalformedError("unbalanced parentheses")
        reduce()
    return values[0]


def solve(numbers: Sequence[int], target: int) -> str | None:
    """An expression that makes the target, or None if there is none: exhaustive, over exact rationals.

    >>> solve([3, 7, 25], 46)
    '(7*3)+25'
    """
    seen: set[tuple[Fraction, ...]] = set()

    def search(items: list[tuple[Fraction, str]]) -> str | None:
        if len(items) == 1:
            return items[0][1] if items[0][0] == target else None
        key = tuple(sorted(value for value, _ in items))
        if key in seen:
            return None
        seen.add(key)
        for i in range(len(items)):
            for j in range(i):
                rest = [item for n, item in enumerate(items) if n not in (i, j)]
                (a, x), (b, y) = items[i], items[j]
                candidates = [(a + b, f"{x}+{y}"), (a * b, f"{x}*{y}"), (a - b, f"{x}-{y}"), (b - a, f"{y}-{x}")]
                if b:
                    candidates.append((a / b, f"{x}/{y}"))
                if a:
                    candidates.append((b / a, f"{y}/{x}"))
                for value, text in candidates:
                    found = search([*rest, (value, f"({text})")])
                    if found is not None:
                        return found
        return None

    expression = search([(Fraction(n), str(n)) for n in numbers])
    return expression[1:-1] if expression and expression.startswith("(") else expression


def read_rows(path: Path) -> Iterator[tuple[tuple[int, ...], int]]:
    """Rows of the public column layout (`nums`: list of int, `target`: int) from a .jsonl or .parquet file.

    Raises:
        TaskError: no such file, another format, or bad rows (all of them are named, up to ten).
    """
    if not path.is_file():
        raise TaskError(f"no such file: {path} (a .jsonl or .parquet file with columns `nums` and `target`)")
    if path.suffix == ".parquet":
        rows = _parquet_rows(path)
    elif path.suffix == ".jsonl":
        rows = _jsonl_rows(path)
    else:
        raise TaskError(f"cannot read {path.name}: give a .jsonl or .parquet file")
    bad: list[str] = []
    good: list[tuple[tuple[int, ...], int]] = []
    for place, row in rows:
        fault = _fault(row)
        if fault:
            bad.append(f"{path.name}:{place}: {fault}")
        else:
            assert isinstance(row, dict)
            good.append((tuple(row["nums"]), row["target"]))
    if bad:
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise TaskError(f"{len(bad)} bad rows:\n  " + "\n  ".join(bad[:10]) + more)
    yield from good


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _fault(row: object) -> str | None:
    if isinstance(row, _NotJSON):
        return f"is not JSON: {row.args[0]}"
    if not isinstance(row, dict) or "nums" not in row or "target" not in row:
        return "needs the columns `nums` and `target`"
    numbers, target = row["nums"], row["target"]

    def whole(n: object) -> bool:
        return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**9

    if not isinstance(numbers, list) or not 2 <= len(numbers) <= 6 or not all(map(whole, numbers)):
        return f"`nums` must be 2 to 6 whole numbers, not {str(numbers)[:60]}"
    if not whole(target):
        return f"`target` must be a whole number, not {str(target)[:60]}"
    return None


class _NotJSON(Exception):  # noqa: N818
    """Stands for a line that cannot be read."""


def _jsonl_rows(path: Path) -> Iterator[tuple[int, object]]:
    # A byte-order mark, as some editors write, is not part of the first line.
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, _NotJSON(error)


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise TaskError("reading Parquet needs pyarrow: pip install 'selfroute[train]'") from error
    try:
        table = parquet.ParquetFile(path)
        missing = {"nums", "target"} - set(table.schema_arrow.names)
        if missing:
            raise TaskError(f"{path.name} has no column {' and '.join(sorted(missing))}")
        for name, kind, fits in (
            ("nums", "a list of integers", lambda t: _is_list(t) and pyarrow.types.is_integer(t.value_type)),
            ("target", "integers", pyarrow.types.is_integer),
        ):
            found = table.schema_arrow.field(name).type
            if not fits(found):
                raise TaskError(f"{path.name}: column {name!r} must hold {kind}, not {found}")
        number = 0
        for batch in table.iter_batches(columns=["nums", "target"]):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise TaskError(f"cannot read {path.name} as Parquet: {error}") from error
