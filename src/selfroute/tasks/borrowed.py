"""Verifiers for a user's own rows that judge as other tasks do: formulas as `maths`, options as `choice`, programs as
`code`. Left out on purpose: these tasks' data sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from selfroute.tasks.choice import ChoiceConfig, MultipleChoice, are_options, choice_problem, one_line
from selfroute.tasks.code import Code, CodeConfig
from selfroute.tasks.code_rows import problem_of
from selfroute.tasks.columns import Cells, Row, RowError, name_of, show, structure, text
from selfroute.tasks.letters import LETTERS
from selfroute.tasks.maths import Maths, MathsConfig
from selfroute.tasks.verifiers import answers, made
from selfroute.types import Problem

if TYPE_CHECKING:
    from selfroute.tasks.custom import CustomConfig


class Formula:
    """A number or a formula, in LaTeX or not."""

    def __init__(self, config: CustomConfig) -> None:
        self.config, self.task = config, Maths(MathsConfig())
        self.verify, self.solution, self.canonical = self.task.verify, self.task.solution, self.task.canonical

    def problem(self, cells: Cells, row: Row) -> Problem:
        """A row's problem."""
        return made(cells["question"], {"answers": answers(cells, self.config)})


class Option:
    """One of the options of the row, by its letter or text."""

    def __init__(self, config: CustomConfig) -> None:
        self.config, self.task = config, MultipleChoice(ChoiceConfig())
        self.verify, self.solution, self.canonical = self.task.verify, self.task.solution, self.task.canonical
        self.read = self.task.read

    def problem(self, cells: Cells, row: Row) -> Problem:
        """A row's problem: its question with the options below it, each with a letter."""
        columns = self.config.columns
        name = name_of(columns, "options")
        options = structure(cells["options"], name)
        if not are_options(options):
            raise RowError(f"{name} must be a list of 2 to {len(LETTERS)} texts, not {show(options)}")
        shown = one_line(options)
        said = " ".join(text(cells["answer"], name_of(columns, "answer")).split())
        return choice_problem(cells["question"], shown, self._right(said, shown))

    def _right(self, said: str, options: Sequence[str]) -> int:
        """The place of the right option, given by its text, its letter, or its place from 0."""
        letters = LETTERS[: len(options)]
        found = {
            # One that is there twice is the same answer by either letter.
            "text": options.index(said) if said in options else None,
            "letter": letters.index(said) if len(said) == 1 and said in letters else None,
            "place": int(said) if said in map(str, range(len(options))) else None,
        }
        wanted = self.config.answer_is
        places = {place for how, place in found.items() if place is not None and wanted in (None, how)}
        column = name_of(self.config.columns, "answer")
        if len(places) > 1:
            raise RowError(
                f"{column} is {said!r}, which is one option's text and another one's place or letter: say which with "
                "task.answer_is, text, letter or place"
            )
        if not places:
            one = f"an option's {wanted}" if wanted else "an option's text, its letter or its place from 0"
            raise RowError(f"{column} must be {one}, not {said[:60]!r}")
        return places.pop()


class Program:
    """A Python program that passes the row's cases or asserts in the sandbox."""

    def __init__(self, config: CustomConfig) -> None:
        self.config = config
        self.task = Code(
            CodeConfig(
                time_limit_s=config.time_limit_s,
                memory_mb=config.memory_mb,
                tolerance=config.tolerance,
                unsafe_sandbox=config.unsafe_sandbox,
            )
        )
        self.verify, self.verify_many = self.task.verify, self.task.verify_many
        self.solution, self.canonical = self.task.solution, self.task.canonical

    def ready(self) -> None:
        """Programs must be isolated.

        Raises:
            TaskError: they cannot be here.
        """
        self.task.sandbox.isolated()

    def problem(self, cells: Cells, row: Row) -> Problem:
        """A row's problem, with its cases or with the first of its asserts below the question."""
        columns, solution = self.config.columns, cells.get("answer")
        names = {"question": "question", "text": "question", "solutions": "answer", "code": "answer"}
        if columns.cases:
            names["input_output"] = "cases"
            values: dict[str, Any] = {
                "question": cells["question"],
                "input_output": cells["cases"],
                "solutions": [solution] if solution else [],
            }
        else:
            names["test_list"] = "tests"
            tests = structure(cells["tests"], name_of(columns, "tests"))
            values = {"text": cells["question"], "test_list": tests, "code": solution}
        found = problem_of(values, max_cases=self.task.config.max_cases)
        if isinstance(found, Problem):
            return found
        # The fault is of a column of TACO or MBPP, which is another one here.
        for theirs, ours in names.items():
            found = str(found).replace(f"`{theirs}`", name_of(columns, ours))
        raise RowError(found)
