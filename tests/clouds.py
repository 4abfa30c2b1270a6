"""Clouds for tests, named in configs by dotted path; each implements `types.CloudClient`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from selfroute.cloud.oracle import Oracle, OracleConfig
from selfroute.config import Choice
from selfroute.errors import CloudError, TaskError
from selfroute.protocol import ANSWER_CLOSE, ANSWER_OPEN
from selfroute.tasks import Task, make_task
from selfroute.types import CloudAnswer, CloudRequest, Problem, Split


class FlakyConfig(OracleConfig):
    """An oracle that fails while a file exists, after some answers."""

    broken: str = ""
    """While this file exists, every request past `answers_first` fails."""
    answers_first: int = 0
    """Requests that succeed all the same."""


class FlakyOracle(Oracle):
    """The oracle, down for as long as a file says so."""

    Config = FlakyConfig

    def __init__(self, config: FlakyConfig) -> None:
        super().__init__(config)
        self.flaky = config
        self.asked: list[str] = []

    async def complete(self, request: CloudRequest) -> CloudAnswer:
        self.asked.append(request.messages[-1]["content"])
        if Path(self.flaky.broken).exists() and len(self.asked) > self.flaky.answers_first:
            raise CloudError("connection refused")
        return await super().complete(request)


class CutOracle(Oracle):
    """An oracle whose answers are right, and cut at the token limit before they say so."""

    async def complete(self, request: CloudRequest) -> CloudAnswer:
        answer = await super().complete(request)
        return replace(answer, text=answer.text.removesuffix(ANSWER_CLOSE), finished=False)


class AnyQuestion(Oracle):
    """An oracle that has something to say to any question."""

    @staticmethod
    def check_question(question: str) -> None:
        """Any will do."""


class ProgramConfig(OracleConfig):
    """A cloud that gives one program to every question."""

    program: str = ""
    """The program."""


class ProgramCloud(AnyQuestion):
    """Answers every question with the same program."""

    Config = ProgramConfig

    def __init__(self, config: ProgramConfig) -> None:
        super().__init__(config)
        self.program = config.program

    def _text(self, question: str) -> str:
        return f"{ANSWER_OPEN}```python\n{self.program}\n```{ANSWER_CLOSE}"


class JudgeConfig(OracleConfig):
    """A judge that says the same of everything."""

    reply: str = "VERDICT: A"
    """What it says."""


class SameJudge(AnyQuestion):
    """Replies to every question with the same text."""

    Config = JudgeConfig

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__(config)
        self.reply = config.reply

    def _text(self, question: str) -> str:
        return self.reply


class LetterConfig(OracleConfig):
    """A cloud that gives one letter to every question."""

    letter: str = "B"
    """The letter."""


class LetterCloud(AnyQuestion):
    """Picks the same option of every question."""

    Config = LetterConfig

    def __init__(self, config: LetterConfig) -> None:
        super().__init__(config)
        self.letter = config.letter

    def _text(self, question: str) -> str:
        return f"{ANSWER_OPEN}({self.letter}){ANSWER_CLOSE}"


class SolvingConfig(OracleConfig):
    """A cloud that knows the reference answers of some tasks."""

    tasks: list[Choice]
    """The tasks."""


class SolvingCloud(AnyQuestion):
    """Gives the reference answer to every question of its tasks."""

    Config = SolvingConfig

    def __init__(self, config: SolvingConfig) -> None:
        super().__init__(config)
        tasks = [make_task(choice) for choice in config.tasks]
        self.known = {p.question: task.solution(p) for task in tasks for found in splits(task).values() for p in found}

    def _text(self, question: str) -> str:
        return f"{ANSWER_OPEN}{self.known[question]}{ANSWER_CLOSE}"


def splits(task: Task) -> dict[Split, list[Problem]]:
    """The problems of the splits that a task has."""
    found: dict[Split, list[Problem]] = {}
    for split in ("train", "calibration", "test"):
        try:
            found[split] = task.load(split)
        except TaskError:
            continue
    return found
