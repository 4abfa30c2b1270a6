"""Open-ended problems, whose answers an LLM judge grades: against a reference answer, or by a rubric.

    row -> Problem(prompt, reference, rubric) -> answer -> ballots -> votes of the judge -> grade -> Verdict

The judge is a provider like the cloud, with a cache and a ledger of its own, which whoever runs the task hands to it
(`ask`). A vote that cannot be read is asked for again, and in the end an error: it never counts as a bad answer. Left
out on purpose: what the judge is asked (`ballots`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from selfroute.config import Choice, Config
from selfroute.errors import CloudError, TaskError
from selfroute.tasks import verdicts
from selfroute.tasks.ballots import Ballot, by_rubric, pairwise, read_vote
from selfroute.tasks.columns import RowError
from selfroute.tasks.datasets import DataConfig, DataSet, Loader
from selfroute.tasks.sources import Hub
from selfroute.tasks.splits import problem_hash
from selfroute.types import About, AskJudge, CloudRequest, Problem, Split, Verdict

_PARTS = {"train": "train", "calibration": "validation", "test": "test"}
_OWN = DataSet("your own", (Hub("", _PARTS),), dict.fromkeys(_PARTS, 0), "yours")


class JudgeConfig(Config):
    """Which open-ended problems there are, who judges the answers, and how."""

    path: str
    """A .jsonl, .json, .csv or .parquet file with a column `prompt` (or `question`), and `reference`, `rubric`,
    `answer` and `label` where they are needed; or a folder of train, test and, if you like, calibration files."""
    judge: Choice
    """The judge: a provider, named and set as a run's cloud is."""
    mode: Literal["pairwise", "rubric"] = "pairwise"
    """Compare with the reference answer (win 1, tie 0.5, loss 0), or give points by a rubric."""
    rubric: str | None = None
    """The rubric of problems that have none in a column of their own."""
    points: int = Field(10, ge=1, le=100)
    """`rubric`: points of a perfect answer; its grade is the share that it gets."""
    pass_score: float = Field(1.0, gt=0, le=1)
    """The grade from which on an answer counts as correct."""
    votes: int = Field(1, ge=1)
    """Votes on an answer; `pairwise`, in each of the two positions. The grade is their mean."""
    retries: int = Field(3, ge=0)
    """How often a vote that cannot be read is asked for again."""
    temperature: float = Field(0.5, ge=0)
    """The judge's sampling temperature; several votes need one above 0."""
    max_answer_chars: int = Field(8000, ge=1)
    """Characters of an answer that the judge is shown."""
    train: int | None = Field(None, ge=1)
    """Training problems, at most."""
    calibration: int | None = Field(None, ge=1)
    """Calibration problems, at most."""
    test: int | None = Field(None, ge=1)
    """Test problems, at most."""

    @field_validator("judge")
    @classmethod
    def _can_judge(cls, judge: Choice) -> Choice:
        if judge.name == "oracle":
            raise ValueError("the oracle solves sums and judges nothing: name a real one, such as judge.name=openai")
        return judge

    @model_validator(mode="after")
    def _votes_differ(self) -> JudgeConfig:
        if self.votes > 1 and self.temperature == 0:
            raise ValueError("several votes at temperature 0 are one vote: raise temperature, or set votes=1")
        return self


@dataclass(frozen=True, slots=True)
class Labelled:
    """An answer that a person, or another reference, gave a grade: `label`, in [0, 1]."""

    problem: Problem
    answer: str
    label: float


class Judge:
    """The task: `load` gives the problems of a split, `verify_many` has answers judged, `verify` one of them."""

    Config = JudgeConfig
    FREE = frozenset({"retries"})
    """Settings that change no verdict: a run may go on with others."""
    ABOUT: tuple[About, ...] = (
        About(
            "judge path=FILE",
            "open-ended prompts of a file; an LLM judge grades answers against a reference or a rubric",
            "as the file has",
            "see its source",
        ),
    )

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.pass_score = config.pass_score
        self.ask: AskJudge | None = None
        self._labelled: list[Labelled] = []
        wanted = {"train": config.train, "calibration": config.calibration, "test": config.test}
        where = DataConfig(path=config.path, **wanted)
        self.data = Loader(Path(config.path).stem, _OWN, where, self._problem_of)

    def load(self, split: Split) -> list[Problem]:
        """The problems of a split, as `Loader.load` says; of one prompt twice, the first.

        Raises:
            TaskError: as there.
        """
        return self.data.load(split)

    @property
    def labelled(self) -> list[Labelled]:
        """The answers with a label, of all splits: a prompt may have several.

        Raises:
            TaskError: as `load`.
        """
        # Reading the rows finds them.
        return self._labelled if self.data.splits else []

    def _problem_of(self, row: Mapping[str, Any]) -> Problem | str:
        try:
            found = _read(row, self.config)
        except RowError as error:
            return str(error)
        if isinstance(found, Labelled):
            self._labelled.append(found)
            return found.problem
        return found

    def training_problems(self, rng: random.Random) -> Iterator[Problem]:
        """Problems of the training split, in a new order each time round, without end."""
        return self.data.training_problems(rng)

    def verify(self, answer: str, problem: Problem) -> Verdict:
        """What the judge makes of an answer.

        Raises:
            CloudError: as `verify_many`.
        """
        return verdicts(self, [(answer, problem)])[0]

    async def verify_many(self, answers: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        """What the judge makes of answers: each vote is bought once for ever, and all are asked for at the same time.

        Raises:
            CloudError: the judge failed, or a vote cannot be read after all retries.
            TaskError: no judge was handed over.
        """
        ballots = [self._ballots(answer, problem) for answer, problem in answers]
        flat = [
            (problem.id, ballot)
            for (_, problem), found in zip(answers, ballots, strict=True)
            if not isinstance(found, Verdict)
            for ballot in found
        ]
        votes = iter(await self._votes(flat))
        return [
            found if isinstance(found, Verdict) else self._verdict(answer, [(ballot, next(votes)) for ballot in found])
            for found, (answer, _) in zip(ballots, answers, strict=True)
        ]

    def _ballots(self, answer: str, problem: Problem) -> tuple[Ballot, ...] | Verdict:
        """What the judge is asked about an answer; a verdict where there is nothing to ask."""
        c = self.config
        reference, rubric = problem.reference["reference"], problem.reference["rubric"]
        if not answer.strip():
            return Verdict(False, "no answer", 0.0)
        if c.mode == "pairwise" and reference:
            return pairwise(problem.question, answer, reference, max_chars=c.max_answer_chars)
        if c.mode == "rubric" and rubric:
            return by_rubric(problem.question, answer, rubric, reference, points=c.points, max_chars=c.max_answer_chars)
        return Verdict(False, "nothing to judge it by is known", extracted=answer.strip(), judged=False)

    async def _votes(self, ballots: Sequence[tuple[str, Ballot]]) -> list[list[int]]:
        """The points of each vote on each ballot. Every sample has a number of its own, so that a rerun draws none
        anew; one that cannot be read is followed by the next."""
        c = self.config
        found: list[list[int]] = [[] for _ in ballots]
        drawn = [0] * len(ballots)
        for _ in range(1 + c.retries):
            due = [
                (n, index)
                for n, votes in enumerate(found)
                for index in range(drawn[n], drawn[n] + c.votes - len(votes))
            ]
            if not due:
                break
            if self.ask is None:
                raise TaskError("the task judge was handed no judge: use selfroute.cloud.memory.open_judge")
            replies = await self.ask(
                [
                    (ballots[n][0], CloudRequest(ballots[n][1].messages, temperature=c.temperature, sample_index=index))
                    for n, index in due
                ]
            )
            for (n, _), reply in zip(due, replies, strict=True):
                drawn[n] += 1
                vote = read_vote(reply.text, ballots[n][1].points) if reply.finished else None
                if vote is not None:
                    found[n].append(vote)
        for (problem, _), votes, samples in zip(ballots, found, drawn, strict=True):
            if len(votes) < c.votes:
                raise CloudError(
                    f"the judge gave {len(votes)} readable votes of {c.votes} on an answer to {problem}, in {samples} "
                    "samples: raise task.retries (a run may go on with more), or name a judge that keeps to the format"
                )
        return found

    def _verdict(self, answer: str, votes: Sequence[tuple[Ballot, Sequence[int]]]) -> Verdict:
        """The mean of all votes, as a share of the most that they could give."""
        points = [(vote, ballot.most) for ballot, some in votes for vote in some]
        # One division of whole numbers, so that 7 of 10 points are 0.7 whatever the number of votes.
        grade = sum(vote for vote, _ in points) / sum(most for _, most in points)
        if self.config.mode == "pairwise":
            better, equal = (sum(vote == worth for vote, _ in points) for worth in (2, 1))
            said = f"{better} better, {equal} equal, {len(points) - better - equal} worse than the reference"
        else:
            said = f"{', '.join(str(vote) for vote, _ in points)} of {self.config.points} points"
        return Verdict(grade >= self.pass_score, f"grade {grade:.3g}: {said}", grade, extracted=answer.strip())

    def solution(self, problem: Problem) -> str | None:
        """The reference answer, where there is one."""
        reference: str | None = problem.reference["reference"]
        return reference

    def read(self, text: str) -> Problem:
        """A prompt in a user's own words, which has no reference answer.

        Raises:
            TaskError: there is no text.
        """
        if not text.strip():
            raise TaskError("need a prompt, such as: Explain why the sky is blue.")
        return _problem(text.strip(), None, self.config.rubric)

    def variants(self, problem: Problem, count: int) -> list[str]:
        """None: a prompt is not ours to reword."""
        return []

    def canonical(self, answer: str) -> str:
        """The answer's words, whatever their case and the space between them."""
        return " ".join(answer.lower().split())


def _read(row: Mapping[str, Any], config: JudgeConfig) -> Problem | Labelled:
    """A row's problem, with the answer that it has a label for, if it has."""
    column = next((name for name in ("prompt", "question") if name in row), None)
    if column is None:
        raise RowError(f"needs a column prompt (or question); it has {', '.join(map(str, row)) or 'none'}")
    prompt = _text(row, column)
    if prompt is None:
        raise RowError(f"{column} is empty")
    reference, rubric = _text(row, "reference"), _text(row, "rubric") or config.rubric
    if config.mode == "pairwise" and reference is None:
        raise RowError("reference is empty: there is nothing to compare an answer with (or set task.mode=rubric)")
    if config.mode == "rubric" and rubric is None:
        raise RowError("rubric is empty: fill the column, or set task.rubric for all problems")
    answer, label = _text(row, "answer"), _label(row.get("label"))
    problem = _problem(prompt, reference, rubric)
    if label is None:
        return problem
    if answer is None:
        raise RowError("has a label and no answer that it is of")
    return Labelled(problem, answer, label)


def _text(values: Mapping[str, Any], column: str) -> str | None:
    """The text of a column, None where it is empty or not there."""
    value = values.get(column)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{column} must be text, not {str(value)[:60]!r}")
    return (value or "").strip() or None


def _label(value: object) -> float | None:
    """A label, which a CSV file holds as text."""
    if value is None or value == "":
        return None
    try:
        label = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        label = -1.0
    if not 0 <= label <= 1:
        raise RowError(f"label must be a number from 0 to 1, not {str(value)[:60]!r}")
    return label


def _problem(prompt: str, reference: str | None, rubric: str | None) -> Problem:
    number = problem_hash(" ".join(prompt.split()))
    return Problem(f"judge-{number:016x}", prompt, {"reference": reference, "rubric": rubric})
