"""Synthetic traces: what the shipped device models imitate before any post-training.

A Countdown trace is a few numbered attempts, each a chain of whole-number steps and a mark (`!` hit, `?` miss), then an
answer or a help call. Which of the two is a coin toss that looks at nothing, so that no routing is taught here (unless
`help_probability_after_hit` says otherwise). An addition trace is the sum written out, then the same toss.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from pydantic import Field

from selfroute.config import Config
from selfroute.errors import TrainingError
from selfroute.protocol import ANSWER_CLOSE, ANSWER_OPEN, HELP_CALL
from selfroute.tasks.countdown import apply
from selfroute.types import Problem


@dataclass(frozen=True, slots=True)
class Chain:
    """One attempt: its steps as text, the value that it reaches, and the expression that it stands for."""

    steps: str
    value: int
    expression: str


@lru_cache(maxsize=4096)
def chains(numbers: tuple[int, ...], max_value: int, operators: str) -> tuple[Chain, ...]:
    """Every chain of `operators` over all numbers whose steps are whole, not negative and at most `max_value`.

    >>> len(chains((3, 7, 12), 199, "+-*")), chains((3, 7, 12), 199, "+-*")[0].steps
    (24, '7+3=10,12+10=22')
    """
    found: dict[str, Chain] = {}

    def walk(items: tuple[tuple[int, str], ...], steps: tuple[str, ...]) -> None:
        if len(items) == 1:
            chain = Chain(",".join(steps), items[0][0], items[0][1])
            found.setdefault(chain.steps, chain)
            return
        for i in range(len(items)):
            for j in range(i):
                # Larger first: sums and products are written one way, differences stay whole.
                (a, x), (b, y) = sorted((items[i], items[j]), key=lambda item: -item[0])
                rest = tuple(item for n, item in enumerate(items) if n not in (i, j))
                for op in operators:
                    if op == "/" and (b == 0 or a % b):
                        continue
                    value = apply(a, op, b)
                    if value <= max_value:
                        text = f"{_group(x)}{op}{_group(y)}"
                        walk((*rest, (value, text)), (*steps, f"{a}{op}{b}={value}"))

    walk(tuple((n, str(n)) for n in numbers), ())
    return tuple(found.values())


def _group(expression: str) -> str:
    return expression if expression.isdigit() else f"({expression})"


HIT, MISS = "!", "?"
"""The marks after an attempt."""


class TraceConfig(Config):
    """How traces search."""

    attempts_max: int = Field(8, ge=1)
    """Most attempts in a trace."""
    solution_probability: float = Field(0.25, ge=0, le=1)
    """Chance that an attempt is a real solution; else it is a random chain."""
    give_up_probability: float = Field(0.15, ge=0, le=1)
    """Chance that a trace ends after a miss."""
    help_probability: float = Field(0.15, ge=0, le=1)
    """Chance that a trace ends in a help call, whatever came before."""
    help_probability_after_hit: float | None = Field(None, ge=0, le=1)
    """Another chance after a hit; the start then knows something of when to ask, as an instruction-tuned LLM does."""
    max_value: int = Field(99, ge=1)
    """Largest value of a step."""
    operators: str = Field("+-*", pattern=r"^[-+*/]+$")
    """What a step may do."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A response to imitate, whether it reached the target, and the chance that the toss asked."""

    text: str
    hit: bool
    help_chance: float


def help_chance(config: TraceConfig, hit: bool) -> float:
    """The chance that a trace asks."""
    after_hit = config.help_probability_after_hit
    return config.help_probability if after_hit is None or not hit else after_hit


def addition_trace(problem: Problem, config: TraceConfig, rng: random.Random) -> Trace:
    """The sum at once, then an answer or, by a coin toss, a help call: long sums are then hard, short ones easy."""
    (a, b), total = problem.reference["numbers"], problem.reference["sum"]
    chance = help_chance(config, True)
    asks = rng.random() < chance
    end = HELP_CALL if asks else f"{ANSWER_OPEN}{total}{ANSWER_CLOSE}"
    return Trace(f"{a}+{b}={total}\n{end}", True, chance)


def countdown_trace(problem: Problem, config: TraceConfig, rng: random.Random) -> Trace:
    """One response text: attempts until a hit, then an answer or, by a coin toss, a help call.

    After a miss the search gives up with `give_up_probability`, and after `attempts_max` at the latest. An attempt is
    a real solution with `solution_probability`, else a random chain not tried before. Without a hit the answer is the
    last attempt's expression, wrong.

    Raises:
        TrainingError: `operators` and `max_value` leave no chain over these numbers.
    """
    numbers, target = problem.reference["numbers"], problem.reference["target"]
    every = chains(tuple(numbers), config.max_value, config.operators)
    if not every:
        raise TrainingError(
            f"no chain over {list(numbers)} with {config.operators!r} stays within {config.max_value}: "
            "allow more operators or a larger max_value"
        )
    hits = [c for c in every if c.value == target]
    untried = list(every)
    rng.shuffle(untried)
    lines: list[str] = []
    chain, hit = untried[-1], False
    for attempt in range(1, config.attempts_max + 1):
        if hits and rng.random() < config.solution_probability:
            chain = rng.choice(hits)
        elif untried:
            chain = untried.pop()
        hit = chain.value == target
        lines.append(f"{attempt}:{chain.steps}{HIT if hit else MISS}\n")
        if hit or rng.random() < config.give_up_probability:
            break
    chance = help_chance(config, hit)
    asks = rng.random() < chance
    end = HELP_CALL if asks else f"{ANSWER_OPEN}{chain.expression}{ANSWER_CLOSE}"
    return Trace("".join(lines) + end, hit, chance)


TRACES = {"countdown": countdown_trace, "addition": addition_trace}
"""How a trace of each task is made, by the task's name."""
