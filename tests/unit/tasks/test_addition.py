from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfroute.cloud.oracle import Oracle, OracleConfig
from selfroute.config import Choice
from selfroute.errors import ConfigError, TaskError
from selfroute.protocol import Answer, cloud_request, parse
from selfroute.tasks import make_task
from selfroute.tasks.addition import Addition, AdditionConfig, answer_question, problem, split_of

TASK = Addition(AdditionConfig())


def test_splits_share_nothing_and_every_length_is_there() -> None:
    splits = {split: TASK.load(split) for split in ("train", "calibration", "test")}  # type: ignore[arg-type]
    assert {name: len(found) for name, found in splits.items()} == {"train": 5000, "calibration": 500, "test": 1000}
    ids = [p.id for found in splits.values() for p in found]
    assert len(set(ids)) == len(ids)
    assert {len(str(n)) for p in splits["test"] for n in p.reference["numbers"]} == set(range(1, 7))
    assert TASK.load("test") == splits["test"]
    assert {split_of(*next(TASK.training_problems(random.Random(s))).reference["numbers"]) for s in range(50)} == {
        "train"
    }


@given(st.integers(0, 10**6 - 1), st.integers(0, 10**6 - 1))
def test_the_sum_is_right_and_order_does_not_matter(a: int, b: int) -> None:
    assert TASK.verify(f" {a + b} ", problem(a, b)).correct
    assert not TASK.verify(str(a + b + 1), problem(a, b)).correct
    assert problem(a, b).id == problem(b, a).id
    assert split_of(a, b) == split_of(b, a)


@given(st.text())
def test_the_verifier_is_total(text: str) -> None:
    assert TASK.verify(text, problem(12, 34)).correct == (text.strip() == "46")


@pytest.mark.parametrize("answer", ["046", "+46", "46.0", "4 6", "", "\u0664\u0666", "9" * 10_000])
def test_other_ways_to_write_it_are_wrong(answer: str) -> None:
    assert not TASK.verify(answer, problem(12, 34)).correct


def test_a_users_own_words() -> None:
    assert TASK.read("12 plus 34") == problem(12, 34)
    for text in ("12", "1 2 3", "1.5 plus 2", "-3 plus 4"):
        with pytest.raises(TaskError, match="need two whole numbers"):
            TASK.read(text)


def test_variants_swap_the_numbers() -> None:
    assert TASK.variants(problem(12, 34), 4) == ["Add the numbers 34 and 12."]
    assert TASK.variants(problem(12, 12), 4) == []


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="digits_min <= digits_max"):
        make_task(Choice(name="addition", digits_min=3, digits_max=2))
    with pytest.raises(TaskError, match=r"only .* distinct test problems"):
        Addition(AdditionConfig(digits_max=1, train=5, calibration=5, test=500)).load("test")


async def _answers(accuracy: float) -> list[bool]:
    oracle, found = Oracle(OracleConfig(accuracy=accuracy)), []
    for p in TASK.load("test")[:200]:
        read = parse((await oracle.complete(cloud_request(p.question))).text)
        assert isinstance(read, Answer)
        found.append(TASK.verify(read.text, p).correct)
    return found


def test_the_oracle_cloud_adds() -> None:
    import asyncio

    assert all(asyncio.run(_answers(1.0)))
    assert 0.6 < sum(asyncio.run(_answers(0.7))) / 200 < 0.8
    assert answer_question("What is 2 plus 2?") is None
