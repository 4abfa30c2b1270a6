"""Programming problems of our own in the column layouts of TACO, HumanEval and MBPP, for the tests of the code task."""

# ruff: noqa: E501 (a row a line)
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selfroute.tasks.code import Code, CodeConfig
from selfroute.tasks.code_rows import problem_of
from selfroute.types import Problem


def taco(
    question: str, inputs: list[Any], outputs: list[Any], function: str | None = None, **more: Any
) -> dict[str, Any]:
    """A row in TACO's layout."""
    cases: dict[str, Any] = {"inputs": inputs, "outputs": outputs}
    if function:
        cases["fn_name"] = function
    row = {
        "question": question, "solutions": [], "starter_code": "", "input_output": json.dumps(cases),
        "difficulty": "EASY", "source": "ours", "time_limit": None,
    }  # fmt: skip
    return {**row, **more}


ROWS: dict[str, dict[str, Any]] = {
    "sum": taco("Print the sum of two whole numbers.", ["1 2\n", "10 -4\n", "0 0\n"], ["3\n", "6\n", "0\n"]),
    "reverse": taco("Print the lines of the input in reverse order.", ["a b\nc\n", ["x", "y  z"]], ["c\na b\n", ["y  z", "x"]]),
    "third": taco("Print a third of a number.", ["1\n", "2\n"], ["0.3333333333\n", "0.6666666667\n"], tolerance=1e-6),
    "exact third": taco("Print a third of a number, with ten digits.", ["1\n"], ["0.3333333333\n"]),
    "mixed": taco("Print a count and a ratio.", ["7\n"], ["1000000 0.5\n"], tolerance=1e-3),
    "quick": taco("Print the sum from 1 to n, n up to 10 ** 12.", ["10\n", "1000000000000\n"],
                  ["55\n", "500000000000500000000000\n"], time_limit="0.25 seconds"),
    "add": taco("Add two numbers with a function.", [[1, 2], [-5, 5], [10**18, 1]], [3, [0], [10**18 + 1]], "add"),
    "twice": taco("Return each number twice.", [[[1, 2]], [[]]], [[[1, 1, 2, 2]], [[]]], "twice"),
    "pairs": taco("Return a list of pairs (value, index).", [[["a", "b"]]], [[["a", 0], ["b", 1]]], "pairs"),
    "invert": taco("Swap the keys and values of a dictionary.", [[{"1": 2, "3": 4}]], [{"2": 1, "4": 3}], "invert"),
    "power": taco("Return 10 ** n.", [], [], "power"),
    "half": taco("Return half of a number.", [[1], [3]], [0.5, 1.5], "half", tolerance=1e-9),
    "two sum": taco("Find the indices of two numbers with a sum.", [[[2, 7, 11], 9], [[3, 3], 6]], [[[0, 1]], [[0, 1]]],
                    "twoSum", starter_code="class Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n"),
    "below zero": {
        "task_id": "Ours/0", "entry_point": "below_zero",
        "prompt": 'from typing import List\n\n\ndef below_zero(moves: List[int]) -> bool:\n'
                  '    """Whether the running total of moves ever falls below zero.\n    >>> below_zero([1, -2])\n    True\n    """\n',
        "canonical_solution": "    total = 0\n    for move in moves:\n        total += move\n        if total < 0:\n"
                              "            return True\n    return False\n",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([]) == False\n"
                "    assert candidate([1, 2, -4]) == True\n    assert candidate([1, -1]) is False\n",
    },
    "root": {
        "task_id": "Ours/1", "entry_point": "find_zero",
        "prompt": 'def poly(cs, x):\n    return sum(c * x ** i for i, c in enumerate(cs))\n\n\n'
                  'def find_zero(cs):\n    """Find x with poly(cs, x) = 0, for cs of length 2."""\n',
        "canonical_solution": "    return -cs[0] / cs[1]\n",
        "test": "import math\n\n\ndef check(candidate):\n    for a, b in ((1, 2), (3, -4), (10, 5)):\n"
                "        assert abs(poly([a, b], candidate([a, b]))) < 1e-4\n",
    },
    "squares": {
        "task_id": 1, "text": "Write a function that returns the squares of numbers as a tuple.", "test_setup_code": "",
        "code": "def squares(xs):\n    return tuple(x * x for x in xs)\n",
        "test_list": ["assert squares([1, 2]) == (1, 4)", "assert squares([]) == ()", "assert squares([-3]) == (9,)"],
    },
    "sum 2": {
        "task_id": 2, "text": "Write a function named sum that adds two numbers.", "test_imports": ["import math"],
        "code": "def sum(a, b):\n    return a + b\n",
        "test_list": ["assert sum(1, 2) == 3", "assert math.isclose(sum(0.1, 0.2), 0.3)"],
    },
    "chain": {
        "task_id": 3, "text": "Write a class Pair (a, b) and a function that counts pairs with a below b.",
        "code": "class Pair:\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n\n\ndef rising(pairs):\n"
                "    return sum(p.a < p.b for p in pairs)\n",
        "test_list": ["assert rising([Pair(1, 2), Pair(2, 1)]) == 1", "assert Pair(3, 4).b == 4"],
    },
}  # fmt: skip
ROWS["power"]["input_output"] = '{"inputs": [[20000]], "outputs": [' + "1" + "0" * 20000 + '], "fn_name": "power"}'


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def code_task(folder: Path, **settings: Any) -> Code:
    """The task over all of `ROWS`."""
    return Code(CodeConfig(path=str(write_rows(folder / "rows.jsonl", list(ROWS.values()))), **settings))


def problems(folder: Path) -> dict[str, Problem]:
    """The problems of `ROWS` by name."""
    # As they come out of a file.
    rows = [json.loads(json.dumps(row)) for row in ROWS.values()]
    return dict(zip(ROWS, map(problem, rows), strict=True))


def problem(row: dict[str, Any], max_cases: int = 100) -> Problem:
    """The problem of a row that is as it should be."""
    found = problem_of(row, max_cases=max_cases)
    assert isinstance(found, Problem), found
    return found
