"""Solutions with the verdicts that they must get: right ones, wrong ones, and those that cheat."""

# ruff: noqa: E501 (a row a line)
from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from selfroute.tasks.code import Code
from selfroute.types import Problem
from tests.programs import code_task, problems

ADD = "print(sum(map(int, input().split())))"
SCAN = "def below_zero(moves):\n    return any(sum(moves[:n]) < 0 for n in range(1, len(moves) + 1))"
# fmt: off
TABLE: list[tuple[str, str, bool, str]] = [
    # Right: standard input and output.
    ("sum", ADD, True, "passes all 3 cases"),
    ("sum", f"```python\n{ADD}\n```", True, "passes all"),
    ("sum", f"First a try:\n```\nprint(0)\n```\nBetter:\n```python\n{ADD}\n```\nDone.", True, "passes all"),
    ("sum", f"```python\n{ADD}", True, "passes all"),
    ("sum", "import sys\na, b = map(int, sys.stdin.read().split())\nsys.stdout.write(str(a + b))", True, "passes all"),
    ("sum", "import sys\na, b = sys.stdin.buffer.readline().split()\nprint(int(a) + int(b), '\\n')", True, "passes all"),
    ("sum", "import os\na, b = os.read(0, os.fstat(0).st_size).split()\nos.write(1, b'%d' % (int(a) + int(b)))", True, "passes"),
    ("sum", "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()", True, "passes"),
    ("sum", f"{ADD}\nexit()", True, "passes all"),
    ("sum", f"{ADD}\nraise SystemExit(0)", True, "passes all"),
    ("sum", f"import sys\nsys.setrecursionlimit(10 ** 6)\n{ADD}", True, "passes all"),
    ("sum", f"import threading\nthreading.stack_size(2 ** 26)\nt = threading.Thread(target=lambda: {ADD})\nt.start()", True, ""),
    ("sum", "f = open(1, 'w', closefd=False)\nf.write(str(sum(map(int, input().split()))))", True, "passes all"),
    ("sum", "import atexit\natexit.register(lambda: print(sum(map(int, open(0).read().split()))))", True, "passes all"),
    ("sum", f"import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\n{ADD}", True, "passes all"),
    ("sum", f"import sys\nsys.stderr.write('x' * 10 ** 7)\n{ADD}", True, "passes all"),
    ("sum", f"open('notes.txt', 'x').write('1')\n{ADD}", True, "passes all"),
    ("sum", f"from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nA(1)\n{ADD}", True, "passes all"),
    ("sum", "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import sys; print(sum(map(int, sys.argv[1:])))',"
            " *input().split()])", True, "passes all"),
    ("reverse", "import sys\nprint('\\n'.join(sys.stdin.read().splitlines()[::-1]))", True, "passes all 2 cases"),
    ("reverse", "import sys\nfor line in sys.stdin.read().splitlines()[::-1]: print('  ' + line + '\\t')", True, "passes all"),
    ("third", "print(int(input()) / 3)", True, "passes all"),
    ("third", "print('%.7f' % (int(input()) / 3))", True, "passes all"),
    ("third", "print('%e' % (int(input()) / 3 + 1e-8))", True, "passes all"),
    ("exact third", "print('%.10f' % (int(input()) / 3))", True, "passes all"),
    ("mixed", "print(1000000, 0.5004)", True, "passes all"),
    ("quick", "n = int(input())\nprint(n * (n + 1) // 2)", True, "passes all"),
    # Right: function calls and methods.
    ("add", "def add(a, b):\n    return a + b", True, "passes all 3 cases"),
    ("add", "add = lambda a, b: a + b\nprint('hello')", True, "passes all"),
    ("add", "def add(a, b):\n    print('noise', a)\n    return a + b\nif __name__ == '__main__':\n    add(input())", True, "passes"),
    ("add", "class Solution:\n    def add(self, a, b):\n        return a + b", True, "passes all"),
    ("twice", "def twice(xs):\n    return [x for x in xs for _ in range(2)]", True, "passes all"),
    ("twice", "def twice(xs):\n    return tuple(x for x in xs for _ in range(2))", True, "passes all"),
    ("pairs", "def pairs(xs):\n    return [(x, i) for i, x in enumerate(xs)]", True, "passes all"),
    ("invert", "def invert(d):\n    return {v: k for k, v in d.items()}", True, "passes all"),
    ("power", "def power(n):\n    return 10 ** n", True, "passes all"),
    ("half", "def half(x):\n    return x / 2 + 1e-12", True, "passes all"),
    ("two sum", "class Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n"
                "        seen = defaultdict(int)\n        for i, n in enumerate(nums):\n            if target - n in seen:\n"
                "                return [seen[target - n], i]\n            seen[n] = i", True, "passes all 2 cases"),
    # Right: asserts.
    ("below zero", SCAN, True, "passes all 1 tests"),
    ("below zero", f"def below_zero(moves: List[int]) -> bool:\n    return {SCAN.rpartition('return ')[2]}", True, "passes all"),
    ("below zero", "```python\n    total = 0\n    for m in moves:\n        total += m\n        if total < 0:\n            return True\n"
                   "    return False\n```", True, "passes all"),
    ("below zero", "total = 0\n    for m in moves:\n        total += m\n        if total < 0:\n            return True\n"
                   "    return False", True, "passes all"),
    ("root", "def find_zero(cs):\n    return -cs[0] / cs[1]", True, "passes all"),
    ("squares", "def squares(xs):\n    return tuple(x * x for x in xs)", True, "passes all 3 tests"),
    ("sum 2", "def sum(a, b):\n    return a + b", True, "passes all 2 tests"),
    ("chain", "from dataclasses import dataclass\n@dataclass\nclass Pair:\n    a: int\n    b: int\n"
              "def rising(pairs):\n    return len([p for p in pairs if p.a < p.b])", True, "passes all"),
    # Wrong output.
    ("sum", "a, b = map(int, input().split())\nprint(a - b)", False, "case 1: wrong output: got '-1' in line 1, expected '3'"),
    ("sum", "a, b = map(int, input().split())\nprint(a + abs(b))", False, "case 2: wrong output: got '14' in line 1, expected '6'"),
    ("sum", "pass", False, "case 1: wrong output: got '' in line 1, expected '3'"),
    ("sum", f"print('The sum is')\n{ADD}", False, "case 1: wrong output"),
    ("sum", f"{ADD}\nprint('done')", False, "case 1: wrong output: got 2 lines, expected 1"),
    ("sum", "print(float(sum(map(int, input().split()))))", False, "case 1: wrong output: got '3.0' in line 1, expected '3'"),
    ("reverse", "import sys\nprint(' '.join(sys.stdin.read().splitlines()[::-1]))", False, "case 1: wrong output"),
    ("reverse", "import sys\nprint('\\n\\n'.join(sys.stdin.read().splitlines()[::-1]))", False, "case 1: wrong output"),
    ("reverse", "import sys\nfor l in sys.stdin.read().splitlines()[::-1]: print(' '.join(l.split()))", False, "case 2: wrong output"),
    ("third", "print('%.3f' % (int(input()) / 3))", False, "case 1: wrong output"),
    ("third", "print('nan')", False, "case 1: wrong output"),
    ("exact third", "print(int(input()) / 3)", False, "case 1: wrong output"),
    ("mixed", "print(1000001, 0.5)", False, "case 1: wrong output"),
    ("add", "def add(a, b):\n    return a - b", False, "case 1: wrong output: got -1, expected 3"),
    ("add", "def add(a, b):\n    print(a + b)", False, "case 1: wrong output: got None, expected 3"),
    ("add", "def add(a, b):\n    return str(a + b)", False, "case 1: wrong output: got '3', expected 3"),
    ("add", "def add(a, b):\n    return float(a) + b", False, "case 3: wrong output"),
    ("twice", "def twice(xs):\n    return map(int, xs)", False, "case 1: runtime error: TypeError: a map is not plain data"),
    ("half", "def half(x):\n    return x // 2", False, "case 1: wrong output: got 0, expected 0.5"),
    ("two sum", "class Solution:\n    def twoSum(self, nums, target):\n        return [1, 0]", False, "case 1: wrong output"),
    ("below zero", "def below_zero(moves):\n    return sum(moves) < 0 or not moves", False,
     "test 1: AssertionError:  at 'assert candidate([]) == False'"),
    ("below zero", "def below_zero(moves):\n    return int(sum(moves) < 0)", False, "'assert candidate([1, -1]) is False'"),
    ("squares", "def squares(xs):\n    return [x * x for x in xs]", False, "test 1: AssertionError"),
    ("squares", "def squares(xs):\n    return tuple(x * abs(x) for x in xs)", False, "test 3: AssertionError"),
    # Errors.
    ("sum", "", False, "no program"),
    ("sum", "```python\n```", False, "case 1: runtime error: SyntaxError"),
    ("sum", "print(", False, "case 1: runtime error: SyntaxError: '(' was never closed"),
    ("sum", "I would add the two numbers.", False, "case 1: runtime error: SyntaxError"),
    ("sum", "#include <stdio.h>\nint main() { return 0; }", False, "case 1: runtime error: SyntaxError"),
    ("sum", "print('\x00')", False, "case 1: runtime error"),
    ("sum", "print('\ud800')", False, "case 1: runtime error"),
    ("sum", "(" * 5000 + ")" * 5000, False, "case 1: "),
    ("sum", "-" * 200000 + "1", False, "case 1: "),
    ("sum", "x = " + "1+" * 200000 + "1", False, "case 1: "),
    ("sum", "a, b, c = input().split()", False, "case 1: runtime error: ValueError: not enough values"),
    ("sum", f"{ADD}\n1 / 0", False, "case 1: runtime error: ZeroDivisionError: division by zero"),
    ("sum", f"{ADD}\nexit(3)", False, "case 1: runtime error: exit status 3"),
    ("sum", f"{ADD}\nraise SystemExit('bad')", False, "case 1: runtime error: bad"),
    ("sum", "def f(n): return f(n + 1)\nf(0)", False, "case 1: runtime error: RecursionError"),
    ("sum", "import numpy_that_is_not_there", False, "case 1: runtime error: ModuleNotFoundError"),
    ("sum", f"{ADD}\nimport os\nos.abort()", False, "case 1: runtime error: killed by signal 6"),
    ("add", "def plus(a, b):\n    return a + b", False, "case 1: runtime error: KeyError: 'add'"),
    ("add", "def add(a):\n    return a", False, "case 1: runtime error: TypeError"),
    ("add", "class Solution:\n    pass", False, "case 1: runtime error: KeyError: 'add'"),
    ("below zero", "def below_zero(moves):\n    return moves.total < 0", False, "AttributeError: 'list' object has no attribute"),
    ("below zero", "x = 1", False, "test 1: AssertionError"),
    ("squares", "def square(xs):\n    return ()", False, "test 1: NameError: name 'squares' is not defined"),
    ("squares", "import nothing_like_it", False, "runtime error: ModuleNotFoundError"),
    # Limits.
    ("quick", "print(sum(range(int(input()) + 1)))", False, "case 2: time limit of 0.5 s"),
    ("sum", f"{ADD}\nwhile True: pass", False, "case 1: time limit of 1 s"),
    ("add", "def add(a, b):\n    while True: pass", False, "case 1: time limit of 1 s"),
    ("below zero", "def below_zero(moves):\n    while True: pass", False, "time limit of 1 s"),
    ("sum", "x = [0]\nwhile True: x += x", False, "case 1: memory limit of 128 MiB"),
    ("sum", "x = bytearray(10 ** 9)", False, "case 1: memory limit of 128 MiB"),
    ("squares", "def squares(xs):\n    return (0,) * 10 ** 9", False, "test 1: MemoryError"),
    ("sum", "while True: print('x' * 1000)", False, "case 1: output limit of 4096 KiB"),
    # Harm; test_sandbox.py looks at what is outside after each kind.
    ("sum", "print(open('/etc/passwd').read())", False, "case 1: runtime error: FileNotFoundError"),
    ("sum", "open('/usr/lib/x', 'w').write('x')", False, "case 1: runtime error: OSError: [Errno 30] Read-only file system"),
    ("sum", "import socket\nsocket.create_connection(('127.0.0.1', 80))", False, "case 1: runtime error: PermissionError"),
    ("sum", "import os\nwhile True: os.fork()", False, "case 1: runtime error: BlockingIOError"),
    ("sum", f"import os\nos.kill(os.getppid(), 9)\n{ADD}", False, "case 1: runtime error: "),
    ("sum", f"import os\nos.kill(-1, 9)\n{ADD}", False, "case 1: runtime error: "),
    ("sum", f"{ADD}\nimport os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(100)", True, "passes all 3 cases"),
    ("sum", f"{ADD}\nimport subprocess\nsubprocess.Popen(['sleep', '100'], start_new_session=True)", True, "passes all 3 cases"),
    ("sum", "x = '" + "x" * 10**6 + "'\n" + ADD, True, "passes all 3 cases"),
    ("sum", "x = '" + "x" * (1 << 20) + "'\n" + ADD, False, "a program of more than 1 MiB"),
    # Cheats.
    ("sum", "import os\nos._exit(0)", False, "case 1: wrong output: got ''"),
    ("sum", "import sys\nsys.stdout.close()", False, "case 1: wrong output"),
    ("add", "import os\nos._exit(0)", False, "case 1: ended before the function returned"),
    ("add", "def add(a, b):\n    raise SystemExit(0)", False, "case 1: ended before the function returned"),
    ("add", "class Always:\n    def __eq__(self, other): return True\ndef add(a, b):\n    return Always()", False, "plain data"),
    ("add", "class Always(int):\n    def __eq__(self, other): return True\n    def __hash__(self): return 1\n"
            "def add(a, b):\n    return Always(9)", False, "case 1: wrong output: got 9, expected 3"),
    ("add", "import sys\nfor n in range(3, 20):\n    try:\n        open(n, 'w').write('true')\n    except OSError: pass\n"
            "sys.exit()", False, "case 1: "),
    ("below zero", "def below_zero(moves): pass\nimport os\nos._exit(0)", False, "EOFError: the program ended before it answered"),
    ("below zero", "class Always:\n    def __eq__(self, other): return True\ndef below_zero(moves):\n    return Always()",
     False, "test 1: AssertionError"),
    ("below zero", "import builtins, sys\nbuiltins.AssertionError = Warning\ndef check(f): pass\n"
                   "def below_zero(moves):\n    sys.exit(0)", False, "EOFError"),
    ("below zero", "import json, os\nfor n in range(3, 20):\n    try:\n        os.write(n, b'{\"passed\": 1}\\n')\n"
                   "    except OSError: pass\ndef below_zero(moves): return None", False, ""),
    ("root", "def poly(cs, x):\n    return 0\ndef find_zero(cs):\n    return 123.0", False, "test 1: AssertionError"),
    ("root", "def abs(x):\n    return 0\ndef find_zero(cs):\n    return 123.0", False, "test 1: AssertionError"),
    ("sum 2", "import math\nmath.isclose = lambda a, b: True\ndef sum(a, b):\n    return 3", False, "test 2: AssertionError"),
    ("squares", "print('{\"passed\": 3}')\ndef squares(xs):\n    return None", False, "test 1: AssertionError"),
]
# fmt: on


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Problem]:
    return problems(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Code:
    return code_task(tmp_path_factory.mktemp("task"), time_limit_s=1, memory_mb=128)


@pytest.mark.parametrize(("name", "answer", "correct", "reason"), TABLE)
def test_verdicts(task: Code, known: dict[str, Problem], name: str, answer: str, correct: bool, reason: str) -> None:
    verdict = task.verify(answer, known[name])
    assert (verdict.correct, reason in verdict.reason) == (correct, True), verdict.reason


def test_the_table_is_as_large_as_it_should_be() -> None:
    assert len(TABLE) >= 60
    assert len({(name, answer) for name, answer, _, _ in TABLE}) == len(TABLE)


@pytest.mark.slow
def test_200_cases_at_a_time_have_no_wrong_verdict(task: Code, known: dict[str, Problem]) -> None:
    """Sixteen times as many at a time as two cores take: most of them wait for their turn."""
    rows = [
        row for row in TABLE if row[0] in ("sum", "add", "quick") and "memory" not in row[3] and "output" not in row[3]
    ]
    rows = (rows * 3)[:200]
    with ThreadPoolExecutor(32) as threads:
        found = list(threads.map(lambda row: task.verify(row[1], known[row[0]]), rows))
    wrong = [
        (row[1], v.reason)
        for row, v in zip(rows, found, strict=True)
        if (v.correct, row[3] in v.reason) != (row[2], True)
    ]
    assert not wrong


def test_eight_threads_and_a_batch_give_the_same_verdicts_as_one(task: Code, known: dict[str, Problem]) -> None:
    # Of each kind some; those that fill memory or time have their own tests.
    rows = [row for row in TABLE if "limit" not in row[3]][::3] * 2
    with ThreadPoolExecutor(8) as threads:
        by_threads = list(threads.map(lambda row: task.verify(row[1], known[row[0]]), rows))
    together = asyncio.run(task.verify_many([(row[1], known[row[0]]) for row in rows]))
    for verdicts in (by_threads, together):
        # Not the whole reason: how a program that writes into every file fails depends on their numbers.
        assert [(v.correct, row[3] in v.reason) for row, v in zip(rows, verdicts, strict=True)] == [
            (row[2], True) for row in rows
        ]
