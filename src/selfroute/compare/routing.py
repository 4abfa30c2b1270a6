"""Routers on a trained model: fitted on training problems, calibrated on others, and only then tested.

`fit_routers` ends before a test problem is loaded, so nothing that is learned or calibrated can have seen one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sklearn.metrics import log_loss

from selfroute.cloud.memory import Cloud
from selfroute.compare.config import CompareConfig
from selfroute.compare.rows import Record, ordering
from selfroute.device.hf import HFEngine
from selfroute.evaluate.calibrate import calibrate
from selfroute.evaluate.run import counter, judge, solve_shares
from selfroute.protocol import cloud_request, parse
from selfroute.routers.agreement import Agreement, DecisionVotes
from selfroute.routers.base import Attempt, Routed, Router
from selfroute.routers.classifier import Boosting, Encoder
from selfroute.routers.collect import Extra, collect
from selfroute.routers.confidence import Confidence
from selfroute.routers.naive import Naive, UnansweredFirst
from selfroute.routers.probe import Probe, PromptProbe
from selfroute.tasks import Task
from selfroute.types import Answer, Progress, Response, Undecided


@dataclass(frozen=True, slots=True)
class Fitted:
    """A router that is ready for the test: what it learned from, and the threshold above which it asks."""

    method: str
    router: Router
    info: dict[str, Any]


LEARN = ("router", "router_encoder", "router_boosting", "prompt_probe", "probe")
"""The methods that are fitted."""


def make_router(method: str, engine: HFEngine, task: Task, config: CompareConfig, seed: int) -> Router:
    """A router by its method's name."""
    makers: dict[str, Callable[[], Router]] = {
        "naive_offloading": lambda: Naive(seed),
        "router_encoder": lambda: Encoder(seed, engine.tokenizer, config.encoder),
        "router_boosting": lambda: Boosting(seed),
        "prompt_probe": PromptProbe,
        "unanswered_first": lambda: UnansweredFirst(seed),
        "log_probability": Confidence,
        "self_consistency": lambda: Agreement(task.canonical, "samples"),
        "prompt_variants": lambda: Agreement(task.canonical, "variants"),
        "probe": Probe,
        "decision_votes": lambda: DecisionVotes(task.canonical),
    }
    return makers[method]()


def fit_routers(
    methods: Sequence[str], engine: HFEngine, task: Task, config: CompareConfig, seed: int, progress: Progress
) -> list[Fitted]:
    """Routers fitted on training problems, their thresholds on calibration problems; the test is not touched.

    `router`, the prompt classifier of the paper's table, is the encoder or the boosting, whichever has the smaller log
    loss on the calibration problems.
    """
    sampling = config.train.evaluation
    wanted = [m for m in methods if m != "router"]
    if "router" in methods:
        wanted += [m for m in ("router_encoder", "router_boosting") if m not in wanted]
    learn, learn_correct = [], []
    clock = Clock()
    if set(wanted) & set(LEARN):
        problems = task.load("train")[: config.fit_problems]
        count = counter(progress, "responses for routers to learn from", len(problems))
        learn = collect(engine, problems, sampling, f"{seed}/fit", progress=count)
        learn_correct = _correct(task, learn, [a.response for a in learn])
    learning = clock.lap()
    held_out = task.load("calibration")
    extra = _extra(wanted, config)
    count = counter(progress, "calibration responses", len(held_out) * (1 + extra.samples + extra.variants))
    held = collect(
        engine, held_out, sampling, f"{seed}/calibration", extra=extra, variants_of=task.variants, progress=count
    )
    holding, held_tokens = clock.lap(), sum(map(_tokens, held))
    fitted: dict[str, Fitted] = {}
    alone: dict[str, Took] = {}
    for method in wanted:
        progress(f"fitting {method}", 1, 1)
        router = make_router(method, engine, task, config, seed)
        clock.lap()
        info: dict[str, Any] = {}
        if method in LEARN:
            router.fit(learn, learn_correct)
        routed = router.route(held)
        scores = [_score(router, a.problem.id, r) for a, r in zip(held, routed, strict=True)]
        info["calibration"] = threshold_for(scores, config.train.budget)
        wrong = [not correct for correct in _correct(task, held, [r.response for r in routed])]
        clipped = [min(max(r.score, 1e-6), 1 - 1e-6) for r in routed]
        alone[method] = clock.lap()
        learns = method in LEARN
        # Responses are collected once for all routers; each is charged with those that it needs.
        tokens = 0 if router.prompt_only else sum(r.device_tokens for r in routed)
        collected = holding.times(tokens / held_tokens).plus(learning.times(learns))
        info["fit"] = {
            "problems": len(learn) if learns else 0,
            "device_accuracy": sum(learn_correct) / len(learn) if learns else None,
            "calibration_accuracy": 1 - sum(wrong) / len(wrong),
            "log_loss": float(log_loss(wrong, clipped, labels=[False, True])),
            "device_tokens": tokens + (sum(map(_tokens, learn)) if learns else 0),
            **collected.plus(alone[method]).json(),
        }
        info["prompt_only"] = router.prompt_only
        fitted[method] = Fitted(method, router, info)
    if "router" in methods:
        best = min(("router_encoder", "router_boosting"), key=lambda m: fitted[m].info["fit"]["log_loss"])
        fit, first = fitted[best].info["fit"], sum(len(a.response.token_ids) for a in held)
        # Both were fitted, and calibration responses say which is better.
        took = (
            learning.plus(alone["router_encoder"])
            .plus(alone["router_boosting"])
            .plus(holding.times(first / held_tokens))
        )
        fit = {**fit, "device_tokens": fit["device_tokens"] + first, **took.json()}
        info = {**fitted[best].info, "chosen": best, "fit": fit}
        fitted["router"] = Fitted("router", fitted[best].router, info)
    return [fitted[m] for m in methods]


def route_test(
    fitted: Sequence[Fitted],
    engine: HFEngine,
    task: Task,
    cloud: Cloud,
    config: CompareConfig,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, list[Record]], list[str | None]]:
    """Each router's records of the test problems, and the answers of the responses that all of them look at first."""
    problems = task.load("test")
    extra = _extra([f.method for f in fitted], config)
    count = counter(progress, "test responses", len(problems) * (1 + extra.samples + extra.variants))
    attempts = collect(
        engine,
        problems,
        config.train.evaluation,
        f"{seed}/test",
        extra=extra,
        variants_of=task.variants,
        progress=count,
    )
    answers = cloud.ask([(p.id, cloud_request(p.question)) for p in problems], phase="evaluate")
    clouds = judge(task, problems, answers)
    routed = {f.method: f.router.route(attempts) for f in fitted}
    # Fresh samples, not those that voted, say whether the device mostly solves what some router asks about.
    asked = [
        a.problem
        for n, a in enumerate(attempts)
        if any(_score(f.router, a.problem.id, routed[f.method][n]) > f.info["calibration"]["threshold"] for f in fitted)
    ]
    sampling = config.train.evaluation
    shares = solve_shares(engine, task, asked, sampling, f"{seed}/test", config.num_samples - 1, progress)
    found: dict[str, list[Record]] = {}
    for f in fitted:
        devices = judge(task, problems, [r.response for r in routed[f.method]])
        found[f.method] = [
            Record(
                problem=a.problem.id,
                score=r.score,
                undecided=_seen_undecided(f.router, r),
                asked=None,
                response=None,
                answer=device.answer,
                device_correct=device.verdict.correct,
                device_tokens=r.device_tokens,
                cloud_correct=given.verdict.correct,
                cloud_tokens=answer.completion_tokens,
                cloud_cost_usd=answer.cost_usd,
                solve_share=shares.get(a.problem.id),
                device_grade=device.verdict.grade,
                cloud_grade=given.verdict.grade,
            )
            for a, r, device, answer, given in zip(attempts, routed[f.method], devices, answers, clouds, strict=True)
        ]
    return found, [_answer(a.response) for a in attempts]


def threshold_for(scores: Sequence[float], budget: float) -> dict[str, Any]:
    """The threshold above which a score asks, calibrated as our own dial is, with what it spends."""
    found = asdict(calibrate(scores, budget, num_problems=len(scores)))
    return {"threshold": -found.pop("bias"), **found}


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds by the clock, and of the processor."""

    seconds: float
    cpu_seconds: float

    def plus(self, other: Took) -> Took:
        return Took(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)

    def times(self, factor: float) -> Took:
        return Took(self.seconds * factor, self.cpu_seconds * factor)

    def json(self) -> dict[str, float]:
        return {"seconds": round(self.seconds, 3), "cpu_seconds": round(self.cpu_seconds, 3)}


class Clock:
    """A stop-watch."""

    def __init__(self) -> None:
        self._at = time.perf_counter(), time.process_time()

    def lap(self) -> Took:
        """What was spent since the last lap, or the start."""
        before, self._at = self._at, (time.perf_counter(), time.process_time())
        return Took(self._at[0] - before[0], self._at[1] - before[1])


def _tokens(attempt: Attempt) -> int:
    """All tokens of an attempt."""
    return sum(len(r.token_ids) for r in (attempt.response, *attempt.samples, *attempt.variants))


def _extra(methods: Sequence[str], config: CompareConfig) -> Extra:
    more = config.num_samples - 1
    return Extra(
        more if {"self_consistency", "decision_votes"} & set(methods) else 0,
        more if "prompt_variants" in methods else 0,
    )


def _correct(task: Task, attempts: Sequence[Attempt], responses: Sequence[Response]) -> list[bool]:
    return [read.verdict.correct for read in judge(task, [a.problem for a in attempts], responses)]


def undecided(response: Response) -> bool:
    """Whether a response has no readable answer and asks for no help."""
    return isinstance(parse(response.text, finished=response.finished), Undecided)


def _answer(response: Response) -> str | None:
    decision = parse(response.text, finished=response.finished)
    return decision.text if isinstance(decision, Answer) else None


def _seen_undecided(router: Router, routed: Routed) -> bool:
    """Whether a router sees that there is no readable answer; one that decides on the prompt does not."""
    return not router.prompt_only and undecided(routed.response)


def _score(router: Router, problem: str, routed: Routed) -> float:
    return ordering(problem, routed.score, _seen_undecided(router, routed))
