"""Evaluation: one device response a problem, both answers that the problem could get, and a record of it.

The answer of each side is known for each problem: an asked problem's local answer is the same prefix continued with
help forbidden, and the cloud is asked (once, through the cache) for every problem, so that the whole curve
along the dial follows from one set of records. Left out on purpose: what the records mean (measures) and how they
look (report).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from selfroute.cloud.memory import Cloud
from selfroute.device.base import Sampling
from selfroute.errors import RunError
from selfroute.measures import Columns
from selfroute.protocol import chat, cloud_request, parse, reasoning_of
from selfroute.records import read_records, write_records
from selfroute.tasks import Task, verdicts
from selfroute.types import (
    Answer,
    CloudAnswer,
    Decision,
    Handoff,
    HelpCall,
    Message,
    Problem,
    Progress,
    Response,
    Route,
    Split,
    Verdict,
)


class Engine(Protocol):
    """What evaluation asks of a device model: in process (`device.hf`) or by URL (`evaluate.remote`).

    What a prompt is, and what a response begins with, is the engine's own affair.
    """

    def encode(self, messages: Sequence[Message]) -> Any:
        """A conversation as a prompt."""
        ...

    def generate(
        self,
        prompts: Sequence[Any],
        streams: Sequence[Sequence[str]],
        sampling: Sampling,
        *,
        starts: Sequence[Any] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Response]]:
        """For each prompt, a response for each of its stream names; all begin with the prompt's start, if any."""
        ...

    def before_the_call(self, response: Response, *, early_exit: bool) -> Any:
        """What a response that asks holds up to where it could have been declined: a start."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one problem came to. `score` is l in nats, None where the device never decided.

    `device_*` is the local answer (of an asked problem: what it would have been), `cloud_*` the cloud's, whether it was
    asked or not. `device_solve_share` is the share of extra samples, help forbidden, that solved an asked problem (None
    where the device answered). A `*_grade` is the verdict's, None where the task is not graded or there is no answer;
    `*_extracted` is what the verifier took for the answer.
    """

    problem: str
    question: str
    response: str
    route: Route
    score: float | None
    correct: bool
    device_answer: str | None
    device_correct: bool
    device_reason: str
    device_solve_share: float | None
    cloud_answer: str
    cloud_correct: bool
    cloud_reason: str
    device_tokens: int
    cloud_tokens: int
    cloud_cost_usd: float
    cloud_latency_s: float
    device_grade: float | None = None
    cloud_grade: float | None = None
    device_extracted: str = ""
    cloud_extracted: str = ""

    @property
    def cost_usd(self) -> float:
        """What this problem's own route cost; the answers bought for comparison are in the ledger."""
        return self.cloud_cost_usd if self.route == "cloud" else 0.0


def evaluate(
    engine: Engine,
    task: Task,
    cloud: Cloud,
    *,
    sampling: Sampling,
    seed: int,
    split: Split = "test",
    solve_samples: int = 0,
    handoff: Handoff = "problem",
    progress: Progress | None = None,
) -> list[Outcome]:
    """An outcome for each problem of a split.

    `solve_samples` extra responses, help forbidden, tell how often the device solves the problems that it asked about.
    With the `handoff` of reasoning the cloud is given that of the responses that asked; what it would have answered to
    the others rests on the problem alone.

    The same seed gives the same reasoning whatever the dial, so that dial settings compare like with like.
    """
    problems = task.load(split)
    prompts, streams, groups = _respond(engine, problems, sampling, f"{seed}/{split}", 1, progress)
    responses = [group[0] for group in groups]
    local = _local_answers(engine, prompts, streams, responses, sampling, progress)
    asked_about = [problems[n] for n in _asked(responses)] if solve_samples else []
    shares = solve_shares(engine, task, asked_about, sampling, f"{seed}/{split}", solve_samples, progress)
    handed = [handed_over(response, handoff) for response in responses]
    requests = [(p.id, cloud_request(p.question, reasoning)) for p, reasoning in zip(problems, handed, strict=True)]
    answers = cloud.ask(requests, phase="evaluate")
    devices, clouds = judge(task, problems, local), judge(task, problems, answers)
    outcomes = []
    for p, response, own, answer, device, given in zip(
        problems, responses, local, answers, devices, clouds, strict=True
    ):
        decision = parse(response.text, finished=response.finished)
        asked = isinstance(decision, HelpCall)
        outcomes.append(
            Outcome(
                problem=p.id,
                question=p.question,
                response=response.text,
                route=route_of(decision),
                score=_score(response, own) if sampling.early_exit else response.score,
                correct=(given if asked else device).verdict.correct,
                device_answer=device.answer,
                device_correct=device.verdict.correct,
                device_reason=device.verdict.reason,
                device_solve_share=shares.get(p.id),
                cloud_answer=given.answer or "",
                cloud_correct=given.verdict.correct,
                cloud_reason=given.verdict.reason,
                device_tokens=len(response.token_ids),
                cloud_tokens=answer.completion_tokens,
                cloud_cost_usd=answer.cost_usd,
                cloud_latency_s=answer.latency_s,
                device_grade=device.verdict.grade,
                cloud_grade=given.verdict.grade,
                device_extracted=device.verdict.extracted,
                cloud_extracted=given.verdict.extracted,
            )
        )
    return outcomes


def local_accuracy(
    engine: Engine,
    task: Task,
    *,
    sampling: Sampling,
    seed: int,
    split: Split,
    progress: Progress | None = None,
) -> float:
    """The accuracy of the device alone, help forbidden; the cloud is not asked."""
    problems = task.load(split)
    alone = sampling.model_copy(update={"forbid_help": True})
    _, _, groups = _respond(engine, problems, alone, f"{seed}/{split}", 1, progress)
    return sum(found.verdict.correct for found in judge(task, problems, [r for [r] in groups])) / len(problems)


def calibration_responses(
    engine: Engine,
    task: Task,
    *,
    sampling: Sampling,
    seed: int,
    draws: int,
    progress: Progress | None = None,
) -> list[tuple[str, Response]]:
    """Problem id and response, `draws` to each calibration problem; the cloud is not asked.

    Where a declined help call goes on, all are: the highest l on the way says at which dial a response asks.
    """
    problems = task.load("calibration")
    if sampling.early_exit:
        sampling = sampling.model_copy(update={"forbid_help": True})
    _, _, groups = _respond(engine, problems, sampling, f"{seed}/calibration", draws, progress)
    return [(p.id, r) for p, group in zip(problems, groups, strict=True) for r in group]


def _respond(
    engine: Engine,
    problems: Sequence[Problem],
    sampling: Sampling,
    stream: str,
    draws: int,
    progress: Progress | None,
) -> tuple[list[Any], list[list[str]], list[list[Response]]]:
    """Prompts, stream names and `draws` responses of each problem."""
    prompts = [engine.encode(chat(p.question)) for p in problems]
    streams = [[f"{stream}/{p.id}/{i}" for i in range(draws)] for p in problems]
    count = counter(progress, "responses", len(problems) * draws)
    return prompts, streams, engine.generate(prompts, streams, sampling, progress=count)


def counter(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    """What an engine calls with the responses that finished since the last call, told as progress of `total`."""
    done = 0

    def count(finished: int) -> None:
        nonlocal done
        done += finished
        if progress:
            progress(what, done, total)

    return count


def route_of(decision: Decision) -> Route:
    """Where a decision leads."""
    return "cloud" if isinstance(decision, HelpCall) else "device" if isinstance(decision, Answer) else "undecided"


@dataclass(frozen=True, slots=True)
class Read:
    """The answer in a text, None where there is none, and the verdict on it."""

    answer: str | None
    verdict: Verdict


def judge(task: Task, problems: Sequence[Problem], texts: Sequence[Response | CloudAnswer]) -> list[Read]:
    """What each text, of the device or of the cloud, answers to its problem; all are judged as one batch."""
    decisions = [parse(t.text, finished=t.finished) for t in texts]
    answers = [(d.text, p) for d, p in zip(decisions, problems, strict=True) if isinstance(d, Answer)]
    found = iter(verdicts(task, answers))
    return [
        Read(d.text, next(found))
        if isinstance(d, Answer)
        else Read(None, Verdict(False, "no answer" if t.finished else "cut at the token limit"))
        for t, d in zip(texts, decisions, strict=True)
    ]


def handed_over(response: Response, handoff: Handoff) -> str:
    """The reasoning that the cloud is given beside the problem: that of a response that asked, or none."""
    asked = isinstance(parse(response.text, finished=response.finished), HelpCall)
    return reasoning_of(response.text) if asked and handoff == "reasoning" else ""


def _score(response: Response, local: Response) -> float | None:
    """The highest l that a response comes to where its help call is declined and it goes on: the dial asks if it asks
    at any."""
    return max((r.score for r in (response, local) if r.score is not None), default=None)


def _asked(responses: Sequence[Response]) -> list[int]:
    return [n for n, r in enumerate(responses) if isinstance(parse(r.text, finished=r.finished), HelpCall)]


def _local_answers(
    engine: Engine,
    prompts: Sequence[Any],
    streams: Sequence[Sequence[str]],
    responses: Sequence[Response],
    sampling: Sampling,
    progress: Progress | None,
) -> list[Response]:
    """Each problem's local answer: the response itself, or for a help call its prefix continued without the tag.

    The prefix ends before the choice between the tags, or before the tag where a declined help call goes on. That one
    has draws of its own, since a response that took tokens back has used up some of those that would come next.
    """
    local = list(responses)
    asked = _asked(responses)
    if asked:
        continued = engine.generate(
            [prompts[n] for n in asked],
            [[f"{name}/local" if sampling.early_exit else name for name in streams[n]] for n in asked],
            sampling.model_copy(update={"forbid_help": True}),
            starts=[engine.before_the_call(responses[n], early_exit=sampling.early_exit) for n in asked],
            progress=counter(progress, "local answers of asked problems", len(asked)),
        )
        for n, group in zip(asked, continued, strict=True):
            local[n] = group[0]
    return local


def solve_shares(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    stream: str,
    samples: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """By problem id, the share of fresh samples without help that solve it."""
    groups = engine.generate(
        [engine.encode(chat(p.question)) for p in problems],
        [[f"{stream}/{p.id}/0/solve/{i}" for i in range(samples)] for p in problems],
        sampling.model_copy(update={"forbid_help": True}),
        progress=counter(progress, "extra samples of asked problems", len(problems) * samples),
    )
    found = iter(judge(task, [p for p in problems for _ in range(samples)], [r for group in groups for r in group]))
    return {p.id: sum(next(found).verdict.correct for _ in range(samples)) / samples for p in problems}


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write an evaluation's records.jsonl."""
    write_records(path, (asdict(outcome) for outcome in outcomes))


def read_outcomes(path: Path) -> list[Outcome]:
    """Read an evaluation's records.jsonl.

    Raises:
        RunError: it is missing or not an evaluation's.
    """
    records: list[dict[str, Any]] = read_records(path)
    try:
        return [Outcome(**record) for record in records]
    except TypeError as error:
        raise RunError(f"{path} is not an evaluation's records: {error}") from error


def columns(outcomes: Sequence[Outcome]) -> Columns:
    """Outcomes as arrays for the measures."""
    return Columns(
        score=np.array([-math.inf if o.score is None else o.score for o in outcomes]),
        asked=np.array([float(o.route == "cloud") for o in outcomes]),
        device=np.array([float(o.device_correct) for o in outcomes]),
        cloud=np.array([float(o.cloud_correct) for o in outcomes]),
    ).graded([o.device_grade for o in outcomes], [o.cloud_grade for o in outcomes])
