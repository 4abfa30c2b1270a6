"""Near-duplicates: what counts, that nothing is missed, and what it costs."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfroute.tasks.near import LEAST, _Text, near
from selfroute.types import Problem

LONG = (
    "A farmer has a field of 40 acres and sows wheat on a quarter of it, barley on a fifth of what is left, and grass "
    "on the rest. How many acres of grass are there?"
)


def problems(name: str, texts: list[str]) -> list[Problem]:
    return [Problem(f"{name}-{n}", text) for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("other", "is_near"),
    [
        (LONG, True),
        (LONG.replace("farmer", "peasant"), True),
        (LONG.replace("A farmer", "Once upon a time a farmer"), True),
        (LONG.lower().replace(",", ", "), True),
        (LONG.replace("40", "$40$"), True),
        # Another number, or the same ones elsewhere in another number: an exercise of the same kind.
        (LONG.replace("40", "60"), False),
        (LONG + " Give 2 decimals.", False),
        (LONG.replace("wheat", "rye").replace("barley", "oats").replace("grass", "clover"), False),
        (LONG[: len(LONG) // 2], False),
        ("Which acre of the 40 is grass?", False),
        ("", False),
    ],
)
def test_what_counts_as_near(other: str, is_near: bool) -> None:
    test = problems("test", ["What is a prime?", LONG, "Name the capital of Peru."])
    found = near(problems("train", ["What is an egg?", other]), test)
    assert [(a.id, b.id) for a, b in found] == ([("train-1", "test-1")] if is_near else [])
    # It does not matter which is which.
    found = near(test, problems("train", [other, "What is an egg?", "Name a river."]))
    assert [(a.id, b.id) for a, b in found] == ([("test-1", "train-0")] if is_near else [])


def test_signs_are_no_noise_and_short_questions_must_be_the_same() -> None:
    test = problems("test", ["Factor $u^2-9$.", "Find $x$ if $x+y=z$.", "Why?"])
    train = problems("train", ["Factor $u^2+9$.", "Find $x$ if $x-y=z$.", "why ?", "Factor u^2-9."])
    assert [(a.id, b.id) for a, b in near(train, test)] == [("train-2", "test-2"), ("train-3", "test-0")]


def test_what_all_test_questions_end_with_does_not_count() -> None:
    end = "\n\nThink it through with care and give the final answer as a fraction in lowest terms inside a box."
    test = problems("test", [f"{text}{end}" for text in ("What is one half?", "Name two thirds.", "Halve it.")])
    train = problems("train", [f"{text}{end}" for text in ("What is a whole?", "Name two thirds.")])
    assert [(a.id, b.id) for a, b in near(train, test)] == [("train-1", "test-1")]


def test_each_training_problem_has_its_nearest_and_itself_is_none() -> None:
    others = ["What is an egg?", "Name a river.", "Why is it dark at night?", "Who was the first to fly?"]
    test = problems("test", [LONG.replace("farmer", "peasant"), LONG, LONG.replace("a field", "land"), *others])
    [(_, nearest)] = near(problems("train", [LONG]), test)
    assert nearest.id == "test-1"
    assert [(a.id, b.id) for a, b in near(test[1:2], test)] == [("test-1", "test-0")]
    assert near([], test) == near(test, []) == []


words = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "1", "2", "+", "-"]), max_size=14).map(" ".join)


@settings(max_examples=150)
@given(st.lists(words, max_size=8), st.lists(words, max_size=8))
def test_nothing_is_missed(training: list[str], test: list[str]) -> None:
    # Each one ends with words of its own, so that none of them are left out as common.
    known = [_Text(text) for text in test]
    common = {
        three
        for text in known
        for three in text.threes
        if sum(three in other.threes for other in known) > max(1, len(known) / 2)
    }
    read = [_Text(text) for text in training]
    for text in (*known, *read):
        text.threes -= common
    expected = [f"train-{n}" for n, text in enumerate(read) if any(text.shared(other) >= LEAST for other in known)]
    found = near(problems("train", training), problems("test", test))
    assert [p.id for p, _ in found] == expected


def test_7500_by_5000_problems_take_seconds() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{n}" for n in range(3000)]

    def text() -> str:
        # Few words make most of a text.
        return "Find the number of " + " ".join(vocabulary[int(3000 * rng.random() ** 3)] for _ in range(60)) + " ?"

    test = [text() for _ in range(5000)]
    train = [text() for _ in range(7400)] + [one.replace(" ? ", " . ") + " Now" for one in test[:100]]
    started = time.process_time()
    found = near(problems("train", train), problems("test", test))
    assert time.process_time() - started < 20
    assert [b.id for _, b in found] == [f"test-{n}" for n in range(100)]
