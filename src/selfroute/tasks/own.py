"""A function of the user's own as the verifier of the user's own rows.

    verify(answer: str, row: Mapping) -> True | 0.5 | (True, "because") | (0.5, "because")

It runs in a process of its own, one answer at a time, so that one that hangs or dies is found out. What it raises stops
the run: it is never a wrong answer. Left out on purpose: guarding against the function itself, which is trusted.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from selfroute.errors import TaskError
from selfroute.tasks.columns import Cells, Row
from selfroute.tasks.pool import Pool
from selfroute.tasks.verifiers import answers, first, made
from selfroute.types import Problem, Verdict

if TYPE_CHECKING:
    from selfroute.tasks.custom import CustomConfig

_MEMORY_BYTES = 1 << 40
"""More than there is: what it takes is the user's business."""


class Own:
    """The function `package.module:name`, of what is installed or in the current directory."""

    def __init__(self, config: CustomConfig) -> None:
        self.config, self.path = config, config.verifier
        self.pool = _pool(config.verifier, os.getcwd())

    def ready(self) -> None:
        """Import it.

        Raises:
            TaskError: it cannot be imported.
        """
        try:
            self.pool.start()
        except TaskError as error:
            where = f"among what is installed and in the current directory, {os.getcwd()}"
            raise TaskError(f"task.verifier: {error}. It is looked for {where}") from error

    def problem(self, cells: Cells, row: Row) -> Problem:
        """A row's problem, which has the whole row: what JSON cannot hold, such as a date, is text."""
        golds = answers(cells, self.config) if self.config.columns.answer else ()
        return made(cells["question"], {"row": json.loads(json.dumps(row, default=str)), "answers": golds})

    def verify(self, answer: str, problem: Problem) -> Verdict:
        """What the function says of an answer.

        Raises:
            TaskError: it raised, took too long, ended its process, or gave what is no verdict.
        """
        done = self.pool.call(answer, problem.reference["row"], limit_s=self.config.time_limit_s)
        if done.failure:
            raise TaskError(
                f"{self.path} failed on the answer {answer[:100]!r}: {done.failure.removeprefix('undecided: ')}"
            )
        return self._verdict(done.result, answer)

    def _verdict(self, said: Any, answer: str) -> Verdict:
        match said:
            case [value, str(reason)]:
                pass
            case value:
                reason = f"{self.path} says {value}"
        if isinstance(value, bool):
            return Verdict(value, reason, extracted=answer.strip())
        if isinstance(value, (int, float)) and 0 <= value <= 1:
            return Verdict(value >= self.config.pass_score, reason, float(value), extracted=answer.strip())
        raise TaskError(
            f"{self.path} must return True, False, a grade from 0 to 1, or one of them and a reason; "
            f"it gave {said!r:.100} for the answer {answer[:100]!r}"
        )

    def solution(self, problem: Problem) -> str | None:
        """An example, where there is one."""
        return first(problem)

    def canonical(self, answer: str) -> str:
        """The text without its capitals and with single spaces."""
        return " ".join(answer.split()).casefold()


@lru_cache
def _pool(path: str, folder: str) -> Pool:
    """One process for each function, however many tasks name it."""
    return Pool(path, size=1, memory_bytes=_MEMORY_BYTES, folders=(folder,))
