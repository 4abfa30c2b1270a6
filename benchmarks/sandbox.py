"""What judging a program costs: python benchmarks/sandbox.py --out FILE

`case_ms_*`: an answer with one case, its sandbox included, one answer after another. `next_case_ms_median`: each
further case of the same answer. Then 200 answers of five cases each, right and wrong in turn, as many at a time as
there are cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path

from selfroute.tasks.code import Code, CodeConfig
from selfroute.tasks.code_rows import problem_of
from selfroute.tasks.sandbox import Job, cores
from selfroute.types import Problem

RIGHT = (
    "import sys\nfrom collections import Counter\nprint(sum(Counter(map(int, sys.stdin.read().split())).elements()))"
)
WRONG = (RIGHT.replace("sum(", "len(list(") + ")", "while True: pass", "raise ValueError", "import os\nos._exit(0)")


def problem(cases: int) -> Problem:
    inputs = [f"{n} {n + 1}\n" for n in range(2, cases + 2)]
    outputs = [f"{2 * n + 1}\n" for n in range(2, cases + 2)]
    row = {"question": "Add.", "input_output": json.dumps({"inputs": inputs, "outputs": outputs})}
    found = problem_of(row, max_cases=cases)
    assert isinstance(found, Problem)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    task = Code(CodeConfig(time_limit_s=1))
    one, five = problem(1), problem(5)
    for _ in range(5):
        task.verify(RIGHT, one)
    times_ms, wrong = [], 0
    for _ in range(200):
        started = time.perf_counter()
        wrong += not task.verify(RIGHT, one).correct
        times_ms.append(1e3 * (time.perf_counter() - started))
    runs = task.sandbox.run(Job(RIGHT, ["1 2\n"] * 200))
    answers = [(RIGHT if n % 2 else WRONG[n // 2 % len(WRONG)], five) for n in range(200)]
    started = time.perf_counter()
    verdicts = asyncio.run(task.verify_many(answers))
    seconds = time.perf_counter() - started
    wrong += sum(v.correct != bool(n % 2) for n, v in enumerate(verdicts))
    found = {
        "case_ms_median": statistics.median(times_ms),
        "case_ms_p99": statistics.quantiles(times_ms, n=100)[98],
        "next_case_ms_median": 1e3 * statistics.median(ran.wall_s for ran in runs[1:]),
        "parallel_answers": len(answers),
        "parallel_seconds": seconds,
        "wrong_verdicts": wrong,
        "cores": cores(),
        "load_average": os.getloadavg()[0],
    }
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
