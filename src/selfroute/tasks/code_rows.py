"""Programming problems in the column layouts of TACO, HumanEval and MBPP; and these data sets, one row each."""

from __future__ import annotations

import ast
import builtins
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from selfroute.tasks.datasets import DataSet
from selfroute.tasks.inside.wire import pack
from selfroute.tasks.sources import Hub
from selfroute.tasks.splits import problem_hash
from selfroute.types import Problem

LEETCODE = """\
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
"""
"""What solutions that fill in starter code expect to be there, as where the problems come from."""


class _Bad(Exception):  # noqa: N818
    """What is wrong with a row."""


_MBPP_COMMIT = "4bb6404fdc6cacfda99d4ac4205087b89d32030c"
_PARTS = {"train": "train", "calibration": "validation", "test": "test"}

CODE_SETS = {
    "taco-verified": DataSet(
        "TACO's problems with solutions that pass (arXiv:2312.14852), 12.9K",
        (Hub("likaixin/TACO-verified", {"train": "train"}),),
        {"train": 0},
        "Apache-2.0; the problems as their sources have it",
    ),
    "humaneval": DataSet(
        "HumanEval (arXiv:2107.03374)",
        (Hub("openai/openai_humaneval", {"test": "test"}, commit="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544"),),
        {"test": 164},
        "MIT",
    ),
    "mbpp": DataSet(
        "MBPP (arXiv:2108.07732)",
        (Hub("google-research-datasets/mbpp", _PARTS, ("full",), _MBPP_COMMIT),),
        {"train": 374, "calibration": 90, "test": 500},
        "CC-BY-4.0",
    ),
    "mbpp-sanitized": DataSet(
        "MBPP, the problems that were checked by hand",
        (Hub("google-research-datasets/mbpp", _PARTS, ("sanitized",), _MBPP_COMMIT),),
        {"train": 120, "calibration": 43, "test": 257},
        "CC-BY-4.0",
    ),
}


def problem_of(row: Mapping[str, Any], *, max_cases: int, difficulty: Sequence[str] = ()) -> Problem | str | None:
    """A row's problem; what is wrong with the row; or None where it is of another `difficulty` than those asked for."""
    try:
        problem = _problem(row, max_cases)
    except _Bad as error:
        return str(error)
    return problem if not difficulty or str(row.get("difficulty") or "") in difficulty else None


def _problem(row: Mapping[str, Any], max_cases: int) -> Problem:
    if "input_output" in row:
        question, reference = _taco(row, max_cases)
    elif "entry_point" in row:
        question, reference = _humaneval(row)
    elif "test_list" in row:
        question, reference = _mbpp(row)
    else:
        raise _Bad(
            "needs the columns of TACO (question, input_output), HumanEval (prompt, test, entry_point) or MBPP (text, "
            f"test_list); it has {', '.join(map(str, row)) or 'none'}"
        )
    tolerance = row.get("tolerance")
    if tolerance is not None:
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
            raise _Bad(f"`tolerance` must be a number from 0 to 1, not {str(tolerance)[:60]}")
        reference["tolerance"] = float(tolerance)
    number = problem_hash(" ".join(question.split()))
    return Problem(f"code-{number:016x}", question, reference)


def _text(row: Mapping[str, Any], *names: str) -> str:
    """The first of some columns that holds text."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
        if value is not None and not isinstance(value, str):
            raise _Bad(f"`{name}` must be text, not {str(value)[:60]}")
    raise _Bad(f"`{' or '.join(names)}` is missing or empty")


def _optional(row: Mapping[str, Any], name: str) -> str:
    return _text(row, name) if row.get(name) not in (None, "") and str(row[name]).strip() else ""


def _json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise _Bad(f"`{name}` is not JSON: {error}") from None


def _whole(digits: str) -> int:
    # Python reads up to 4,300 digits; problems about large numbers have more.
    return int(digits) if len(digits) < 4000 else int(Decimal(digits))


def _taco(row: Mapping[str, Any], max_cases: int) -> tuple[str, dict[str, Any]]:
    cases = _json(row["input_output"], "input_output")
    if not isinstance(cases, dict):
        raise _Bad(f"`input_output` must be JSON with inputs and outputs, not {str(row['input_output'])[:60]}")
    inputs, outputs, function = cases.get("inputs"), cases.get("outputs"), cases.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise _Bad("`input_output` must hold as many outputs as inputs, in two lists")
    if not inputs:
        raise _Bad("`input_output` holds no case")
    if function is not None and not (isinstance(function, str) and function.isidentifier()):
        raise _Bad(f"`fn_name` in `input_output` must be a name, not {str(function)[:60]}")
    solutions = _json(row.get("solutions") or [], "solutions")
    if not isinstance(solutions, list) or not all(isinstance(s, str) for s in solutions):
        raise _Bad("`solutions` must be a list of programs")
    question, starter = _text(row, "question"), _optional(row, "starter_code")
    reference: dict[str, Any] = {
        "kind": "call" if function else "script",
        "time_limit_s": _seconds(row.get("time_limit")),
        "solution": solutions[0] if solutions else None,
    }
    inputs, outputs = inputs[:max_cases], outputs[:max_cases]
    if function:
        if not all(isinstance(args, list) for args in inputs):
            raise _Bad("`inputs` in `input_output` must be lists of arguments, as there is a `fn_name`")
        if starter:
            question += f"\n\nComplete this Python 3 code:\n\n```python\n{starter.rstrip()}\n```"
        else:
            question += f"\n\nAnswer with a Python 3 function named {function}."
        reference |= {
            "function": function,
            "inputs": tuple(json.dumps(pack([_whole_keys(a) for a in args])) for args in inputs),
            "outputs": tuple(
                [_whole_keys(v) for v in value] if isinstance(value, list) else _whole_keys(value) for value in outputs
            ),
            "setup": LEETCODE,
        }
    else:
        question += "\n\nAnswer with a Python 3 program that reads standard input and writes standard output."
        reference |= {"inputs": tuple(map(_joined, inputs)), "outputs": tuple(map(_joined, outputs))}
    return question, reference


def _joined(lines: Any) -> str:
    # Some rows hold a text, some a list of its lines, some a bare number.
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)


def _whole_keys(value: Any) -> Any:
    # JSON made text of whole numbers that were keys.
    if isinstance(value, dict) and value and all(re.fullmatch(r"-?[0-9]{1,18}", k) for k in value):
        return {int(k): v for k, v in value.items()}
    return value


def _seconds(limit: Any) -> float | None:
    """Seconds in such texts as "2.0 seconds" or "0.5 - 1 sec" (the last number); None where there are none."""
    numbers = re.findall(r"[0-9]+(?:\.[0-9]+)?", str(limit))
    if limit is None or not numbers or float(numbers[-1]) <= 0:
        return None
    return float(numbers[-1]) / (1000 if re.search(r"[0-9] *m(?:s\b|illi)", str(limit)) else 1)


def _humaneval(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    prompt, test, entry = _text(row, "prompt"), _text(row, "test"), _text(row, "entry_point")
    start = re.search(rf"^def {re.escape(entry)}\b", prompt, re.MULTILINE)
    if start is None or not entry.isidentifier():
        raise _Bad(f"`prompt` does not define `entry_point`, {entry[:60]!r}")
    solution = _optional(row, "canonical_solution")
    question = f"Complete this Python 3 code, and answer with the whole function:\n\n```python\n{prompt.strip()}\n```"
    return question, {
        "kind": "tests",
        "time_limit_s": None,
        "solution": prompt + solution if solution else None,
        "prompt": prompt,
        "setup": prompt[: start.start()],
        "function": entry,
        "tests": {"setup": [prompt], "tests": [f"{test}\n\ncheck({entry})"], "names": [entry]},
    }


def _mbpp(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    tests, imports = row["test_list"], row.get("test_imports") or []
    for name, texts in (("test_list", tests), ("test_imports", imports)):
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise _Bad(f"`{name}` must be a list of texts, not {str(texts)[:60]}")
    if not tests:
        raise _Bad("`test_list` is empty")
    code, setup = _optional(row, "code"), _optional(row, "test_setup_code")
    names = _judged([*imports, setup], tests, code)
    # One test shows the name and the kind of arguments; all of them would show what to print.
    text = _text(row, "text", "prompt").strip()
    question = f"{text}\n\nYour Python 3 code must pass tests such as:\n\n```python\n{tests[0]}\n```"
    return question, {
        "kind": "tests",
        "time_limit_s": None,
        "solution": code or None,
        "setup": "",
        "function": "",
        "tests": {
            "setup": [*imports, setup],
            "tests": tests,
            "names": names,
        },
    }


def _judged(setup: Sequence[str], tests: Sequence[str], code: str) -> list[str]:
    """The names that a solution defines, which are the program's whatever else they could be.

    Other names of the tests are the program's where nothing else has them. Tests that name nothing of the program's
    would pass any program, even none.
    """
    ready, asked = _parsed("\n".join(setup), "test_imports"), _parsed("\n".join(tests), "test_list")
    before, here = _made(ready), _made(asked)
    if "*" in here:
        raise _Bad("`test_list` imports `*`, which may be what the program defines: import names one by one")
    try:
        defined = _defined(_parsed(code, "code"), _names(ready, ast.Store))
    except _Bad:
        # No program is judged by it.
        defined = []
    used = (_names(ready, ast.Load) | _names(asked, ast.Load)) - here
    if used.isdisjoint(defined) and ("*" in before or not used - before - set(dir(builtins))):
        raise _Bad(
            "`test_list` asks for nothing that is the program's alone, but for "
            f"{', '.join(sorted(used)) or 'nothing'}, which Python or an import has, too: give a solution in `code` "
            "that defines what is judged"
        )
    return defined


def _parsed(text: str, name: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            # Of backslashes in texts, which are the file's affair.
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _Bad(f"`{name}` is not Python: {error}") from error


def _names(tree: ast.Module, context: type[ast.expr_context]) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


def _made(tree: ast.Module) -> set[str]:
    """The names that a text gives something to, `*` for those of a whole module."""
    made = _names(tree, ast.Store)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.alias):
            made.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.arg):
            made.add(node.arg)
    return made


def _defined(tree: ast.Module, stored: set[str]) -> list[str]:
    """A program's functions and classes, and what else it gives a name that may be called; `stored` are the tests'."""
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda | ast.Name | ast.Attribute | ast.Call):
            names += [one.id for one in node.targets if isinstance(one, ast.Name) and one.id not in stored]
    return names
