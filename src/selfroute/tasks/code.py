"""Programming problems: the answer is a Python program, which is run on cases in a sandbox.

A case is standard input and output, a function call, or a test with asserts. What is expected never enters the sandbox
that runs the answer. Left out on purpose: other languages, and problems with many right answers, which need a checker.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field

from selfroute.errors import TaskError
from selfroute.tasks.box import Limits, Ran
from selfroute.tasks.code_rows import CODE_SETS, problem_of
from selfroute.tasks.datasets import DataConfig, Loader
from selfroute.tasks.outputs import returned, show, text_fault, value_fault
from selfroute.tasks.sandbox import Job, Sandbox
from selfroute.tasks.splits import problem_hash
from selfroute.types import Problem, Split, Verdict


class CodeConfig(DataConfig):
    """Which programming problems there are, and what an answer may take."""

    dataset: Literal["taco-verified", "humaneval", "mbpp", "mbpp-sanitized"] = "taco-verified"
    """The data set; `humaneval` is a test, the others can be trained on. Files may be in the columns of any of them."""
    difficulty: tuple[str, ...] = ()
    """Only problems whose column `difficulty` is one of these; all where it is empty."""
    max_cases: int = Field(100, ge=1)
    """Cases of a problem that are run: the first ones."""
    time_limit_s: float = Field(4.0, gt=0, le=600)
    """Processor seconds of a case, where the problem does not say."""
    time_factor: float = Field(2.0, gt=0)
    """Where it does: times this, as such limits are meant for compiled programs."""
    total_s: float = Field(60.0, gt=0)
    """Seconds after which no further case of an answer begins; the answer is wrong then."""
    memory_mb: int = Field(512, ge=64)
    """Memory of a case, in MiB."""
    tolerance: float = Field(0.0, ge=0, lt=1)
    """How far a decimal fraction may be off, absolutely or relatively, where a problem has no column `tolerance`; whole
    numbers never may."""
    unsafe_sandbox: bool = False
    """Where programs cannot be isolated, run them all the same, with resource limits only."""


_LONGEST = 1 << 20
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


class Code:
    """The task: `load` gives the problems of a split, `verify` runs an answer, `verify_many` many at a time."""

    Config = CodeConfig
    ABOUT = tuple(one.about(f"code dataset={name}") for name, one in CODE_SETS.items())

    def __init__(self, config: CodeConfig) -> None:
        self.config = config
        self.sandbox = Sandbox(unsafe=config.unsafe_sandbox)
        read = partial(problem_of, max_cases=config.max_cases, difficulty=config.difficulty)
        only = f"difficulty {' or '.join(config.difficulty)}" if config.difficulty else ""
        about = CODE_SETS[config.dataset]
        self.data = Loader(config.dataset, about, config, read, instead="taco-verified", only=only)

    def load(self, split: Split) -> list[Problem]:
        """The problems of a split, as `Loader.load` says.

        Raises:
            TaskError: as there, or programs cannot be isolated here.
        """
        # Found out now, before anything is paid for.
        self.sandbox.isolated()
        return self.data.load(split)

    def training_problems(self, rng: random.Random) -> Iterator[Problem]:
        """Problems of the training split, in a new order each time round, without end."""
        return self.data.training_problems(rng)

    def verify(self, answer: str, problem: Problem) -> Verdict:
        """Whether the program in an answer passes all cases. It stops at the first that fails, and says how.

        Raises:
            TaskError: the sandbox could not be started, which says nothing of the answer.
        """
        job = self._job(answer, problem)
        return job if isinstance(job, Verdict) else self._verdict(answer, problem, self.sandbox.run(job))

    async def verify_many(self, answers: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        """`verify` for many answers, as many at a time as there are cores; the verdicts in their order."""
        jobs = [self._job(answer, problem) for answer, problem in answers]
        runs = iter(await self.sandbox.run_many([job for job in jobs if isinstance(job, Job)]))
        return [
            job if isinstance(job, Verdict) else self._verdict(answer, problem, next(runs))
            for job, (answer, problem) in zip(jobs, answers, strict=True)
        ]

    def solution(self, problem: Problem) -> str | None:
        """A program that is right, where the file has one."""
        solution: str | None = problem.reference.get("solution")
        return solution

    def read(self, text: str) -> Problem:
        """A problem in a user's own words, which has no cases: no answer to it is judged correct.

        Raises:
            TaskError: the text is empty.
        """
        if not text.strip():
            raise TaskError("need a programming problem in words")
        return Problem(f"code-{problem_hash(' '.join(text.split())):016x}", text, {})

    def variants(self, problem: Problem, count: int) -> list[str]:
        """None: a problem's text is not ours to reword."""
        return []

    def canonical(self, answer: str) -> str:
        """The program without empty lines, comments on lines of their own, and white space at the ends of lines."""
        lines = [line.rstrip() for line in program_of(answer).splitlines()]
        return "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))

    def _limits(self, problem: Problem) -> Limits:
        c, own = self.config, problem.reference["time_limit_s"]
        cpu_s = min(c.time_limit_s if own is None else own * c.time_factor, 600.0)
        return Limits(cpu_s=cpu_s, wall_s=4 * cpu_s + 4, memory_mb=c.memory_mb)

    def _job(self, answer: str, problem: Problem) -> Job | Verdict:
        """What is to be run; a verdict where nothing is."""
        reference, program = problem.reference, program_of(answer)
        if not reference:
            return Verdict(False, "no cases to judge an answer by are known", extracted=program, judged=False)
        if not program.strip():
            return Verdict(False, "no program")
        if len(program) > _LONGEST:
            return Verdict(False, f"a program of more than {_LONGEST >> 20} MiB", extracted=program)
        if "prompt" in reference and not re.search(rf"^def {reference['function']}\b", program, re.MULTILINE):
            # The body alone, whose first line may have lost its indentation.
            program = reference["prompt"] + ("" if program[0].isspace() else "    ") + program
        tests = reference["kind"] == "tests"
        return Job(
            program=program,
            cases=[json.dumps(reference["tests"])] if tests else reference["inputs"],
            mode=reference["kind"],
            function=reference.get("function", ""),
            setup=reference.get("setup", ""),
            limits=self._limits(problem),
            total_s=self.config.total_s,
            goes_on=lambda case, ran: self._fault(problem, case, ran) is None,
        )

    def _verdict(self, answer: str, problem: Problem, runs: Sequence[Ran]) -> Verdict:
        reference, last = problem.reference, len(runs) - 1
        fault = self._fault(problem, last, runs[last])
        if reference["kind"] == "tests":
            passed = f"passes all {len(reference['tests']['tests'])} tests"
        else:
            count = len(reference["inputs"])
            passed = f"passes all {count} cases"
            if fault is None and len(runs) < count:
                fault = f"time limit of {self.config.total_s:g} s for all {count} cases"
            fault = fault and f"case {last + 1}: {fault}"
        return Verdict(fault is None, fault or passed, extracted=program_of(answer))

    def _fault(self, problem: Problem, case: int, ran: Ran) -> str | None:
        """What is wrong with a case; None where it passes."""
        reference, limits = problem.reference, self._limits(problem)
        if reference["kind"] == "tests" and ran.limit is None:
            fault = _tests_fault(ran.answers, len(reference["tests"]["tests"]))
            return fault if fault is None or not ran.status else _failure(ran, limits) or fault
        failure = _failure(ran, limits)
        if failure is not None:
            return failure
        tolerance, expected = reference.get("tolerance", self.config.tolerance), reference["outputs"][case]
        if reference["kind"] == "script":
            fault = text_fault(ran.stdout, expected, tolerance)
            return fault and f"wrong output: {fault}"
        if not ran.answers:
            return "ended before the function returned"
        try:
            fault = value_fault(returned(ran.answers), expected, tolerance)
        except (ValueError, TypeError, KeyError, RecursionError):
            return "wrong output: not plain data"
        return fault and f"wrong output: {fault}"


def program_of(answer: str) -> str:
    """The program in an answer: its last code fence, or all of it.

    >>> program_of("It adds.\\n```python\\nprint(1 + 1)\\n```")
    'print(1 + 1)\\n'
    >>> program_of("print(2)")
    'print(2)'
    """
    fenced = [inside for inside in _FENCE.findall(answer) if inside.strip()]
    return fenced[-1] if fenced else answer


def _failure(ran: Ran, limits: Limits) -> str | None:
    """How a program failed to end well; None where it did."""
    if ran.limit == "cpu":
        return f"time limit of {limits.cpu_s:g} s"
    if ran.limit == "wall":
        return f"time limit: not done after {limits.wall_s:g} s of waiting"
    if ran.limit == "memory":
        return f"memory limit of {limits.memory_mb} MiB"
    if ran.limit == "output":
        return f"output limit of {limits.output_kb} KiB"
    if ran.status is None:
        return "runtime error: ended its sandbox"
    if ran.status < 0:
        return f"runtime error: killed by signal {-ran.status}"
    if ran.status > 0:
        return f"runtime error: {_last_line(ran.stderr) or f'exit status {ran.status}'}"
    return None


def _last_line(stderr: str) -> str:
    return stderr.strip().rpartition("\n")[2].strip()[:200]


def _tests_fault(answers: str, count: int) -> str | None:
    """What the tests said of a program; None where all passed."""
    try:
        said: dict[str, Any] = json.loads(answers)
        if said.get("passed") == count:
            return None
        place = f"test {said['failed']}" if said["failed"] else "before the first test"
        line = f" at {show(said['line'], 100)}" if said["line"] else ""
        return f"{place}: {said['error'][:200]}{line}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "the tests ended without a verdict"
