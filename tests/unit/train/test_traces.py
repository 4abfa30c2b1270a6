from __future__ import annotations

import random
import re

import pytest

from selfroute.api import load_train_config, load_warmstart_config
from selfroute.errors import TrainingError
from selfroute.protocol import parse
from selfroute.tasks.addition import Addition, AdditionConfig
from selfroute.tasks.countdown import Countdown, CountdownConfig, problem, split_of, verify
from selfroute.train.traces import TraceConfig, addition_trace, chains, countdown_trace
from selfroute.train.warmstart import determined, train_tokenizer
from selfroute.types import Answer, HelpCall

CONFIG = load_warmstart_config("countdown-1m")


def test_every_chain_is_a_right_expression_of_its_value() -> None:
    for numbers in ((3, 7, 12), (5, 5, 5), (1, 20, 20)):
        for chain in chains(numbers, 99, "+-*/"):
            assert verify(chain.expression, numbers, chain.value).correct


def test_the_warm_start_never_sees_a_test_or_calibration_problem() -> None:
    task = Countdown(CountdownConfig())
    held_out = {p.id for split in ("calibration", "test") for p in task.load(split)}
    source = task.training_problems(random.Random("warmstart-0"))
    seen = [next(source) for _ in range(20_000)]
    assert not held_out & {p.id for p in seen}
    assert all(split_of(p.reference["numbers"], p.reference["target"]) == "train" for p in seen)


def test_asking_is_a_coin_toss_that_looks_at_nothing() -> None:
    rng = random.Random(0)
    source = Countdown(CountdownConfig()).training_problems(rng)
    asked: dict[bool, list[bool]] = {True: [], False: []}
    for _ in range(20_000):
        p = next(source)
        text = countdown_trace(p, CONFIG, rng).text
        decision = parse(text)
        assert isinstance(decision, HelpCall) or (isinstance(decision, Answer) and decision.well_formed)
        asked["!" in text].append(isinstance(decision, HelpCall))
    shares = {hit: sum(a) / len(a) for hit, a in asked.items()}
    # Three standard errors of 5,000 tosses.
    assert all(abs(share - 0.15) < 0.015 for share in shares.values()), shares


def test_a_trace_is_honest() -> None:
    rng = random.Random(1)
    source = Countdown(CountdownConfig()).training_problems(rng)
    for _ in range(500):
        p = next(source)
        numbers, target = p.reference["numbers"], p.reference["target"]
        text = countdown_trace(p, CONFIG, rng).text
        lines = text.splitlines()
        attempts = [re.fullmatch(r"(\d+):(.+)=(\d+)([!?])", line) for line in lines[:-1]]
        assert 1 <= len(attempts) <= 8
        for n, match in enumerate(attempts, 1):
            assert match is not None
            assert int(match[1]) == n
            assert (match[4] == "!") == (int(match[3]) == target)
        decision = parse(text)
        if isinstance(decision, Answer):
            assert verify(decision.text, numbers, target).correct == ("!" in text)


def test_digits_are_tokens_and_results_are_marked() -> None:
    tokenizer = train_tokenizer()
    ids = tokenizer.encode("1:19-7=12,3+12=15?\n2:3+12=15,15+4=19!\n", add_special_tokens=False)
    assert len(ids) == len("1:19-7=12,3+12=15?2:3+12=15,15+4=19!")
    marked = [tokenizer.decode([i]) for i, d in zip(ids, determined(ids, tokenizer), strict=True) if d]
    assert marked == ["1", "2", "1", "5", "?\n", "1", "5", "1", "9", "!\n"]


def test_every_trace_fits_the_main_jobs_token_limit() -> None:
    tokenizer, rng = train_tokenizer(), random.Random(2)
    limit = load_train_config("countdown-tiny").sampling.max_tokens
    long = CONFIG.model_copy(update={"solution_probability": 0.0, "give_up_probability": 0.0})
    source = Countdown(CountdownConfig()).training_problems(rng)
    for _ in range(500):
        p = next(source)
        text = countdown_trace(p, long, rng).text
        assert len(tokenizer.encode(text, add_special_tokens=False)) < limit


def test_numbers_without_a_chain_are_named() -> None:
    with pytest.raises(TrainingError, match=r"no chain over \[20, 20, 20\] with '\*' stays within 99"):
        countdown_trace(problem((20, 20, 20), 60), TraceConfig(operators="*"), random.Random(0))


def test_traces_use_the_operators_that_they_may() -> None:
    assert {c for chain in chains((12, 6, 2), 99, "+-*") for c in chain.steps} <= set("0123456789+-*=,")
    assert any("/" in chain.steps for chain in chains((12, 6, 2), 99, "+-*/"))


def test_asking_may_know_of_hits() -> None:
    rng = random.Random(0)
    informed = CONFIG.model_copy(update={"help_probability": 0.3, "help_probability_after_hit": 0.03})
    source = Countdown(CountdownConfig()).training_problems(rng)
    traces = [countdown_trace(next(source), informed, rng) for _ in range(8000)]
    for hit, chance in ((True, 0.03), (False, 0.3)):
        mine = [t for t in traces if t.hit == hit]
        assert all(t.help_chance == chance and ("!" in t.text) == hit for t in mine)
        share = sum(isinstance(parse(t.text), HelpCall) for t in mine) / len(mine)
        assert abs(share - chance) < 3 * (chance * (1 - chance) / len(mine)) ** 0.5


def test_an_addition_trace_is_the_sum_and_a_toss() -> None:
    rng, task = random.Random(0), Addition(AdditionConfig())
    source = task.training_problems(rng)
    asked = 0
    for _ in range(2000):
        p = next(source)
        made = addition_trace(p, CONFIG, rng)
        line, tag = made.text.splitlines()
        (a, b), total = p.reference["numbers"], p.reference["sum"]
        assert (line, a + b) == (f"{a}+{b}={total}", total)
        decision = parse(tag)
        asked += isinstance(decision, HelpCall)
        assert isinstance(decision, HelpCall) or (
            isinstance(decision, Answer) and task.verify(decision.text, p).correct
        )
    assert abs(asked / 2000 - 0.15) < 0.025
