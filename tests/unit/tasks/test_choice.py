"""The choice task on fixture files in each data set's own columns."""

from __future__ import annotations

import json
import random
import re
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pytest

from selfroute.api import load_train_config
from selfroute.config import Choice
from selfroute.errors import TaskError
from selfroute.tasks import make_task
from selfroute.tasks.check import check
from selfroute.tasks.choice import CHOICE_SETS, ChoiceConfig, MultipleChoice
from selfroute.types import Problem

FIXTURES = Path(__file__).parents[2] / "fixtures/choice"


def task(dataset: str = "mmlu", **settings: Any) -> MultipleChoice:
    settings.setdefault("data_dir", None if "path" in settings else str(FIXTURES))
    made = make_task(Choice(name="choice", dataset=dataset, **settings))
    assert isinstance(made, MultipleChoice)
    return made


def by_question(problems: list[Problem], text: str) -> Problem:
    [found] = [p for p in problems if text in p.question]
    return found


def test_every_setting_has_a_row_and_every_row_a_setting() -> None:
    assert set(get_args(ChoiceConfig.model_fields["dataset"].annotation)) == set(CHOICE_SETS)
    assert all(set(about.sizes) == set(hub.parts) for about in CHOICE_SETS.values() for hub in about.hubs)


@pytest.mark.parametrize(
    ("dataset", "sizes"),
    [
        ("mmlu", (12, 3, 4)),
        ("mmlu-pro", (0, 1, 3)),
        ("agieval-sat-math", (0, 0, 3)),
        ("arc-challenge", (10, 1, 3)),
        ("arc-easy", (13, 4, 1)),
    ],
)
def test_each_layout_loads_and_its_references_verify_themselves_alone(dataset: str, sizes: tuple[int, ...]) -> None:
    made = task(dataset)
    assert tuple(len(made.data.splits[split]) for split in ("train", "calibration", "test")) == sizes
    problems = [p for found in made.data.splits.values() for p in found]
    assert len({p.id for p in problems}) == len(problems)
    # An option that stands there twice is right by either letter.
    assert not any(check(made, [p for p in problems if "Norway" not in p.question]))
    if dataset == "mmlu-pro":
        with pytest.raises(TaskError, match=r"mmlu-pro holds test problems only: train on task\.dataset=mmlu, then"):
            made.load("train")


def test_a_question_shows_its_options_by_letter() -> None:
    bees = by_question(task("arc-challenge").load("test"), "bees")
    assert bees.question == (
        "What do bees carry from flower to flower?\n\nA. soil\nB. seeds\nC. pollen\nD. water\n\n"
        "Answer with the letter of the right option."
    )
    assert task().solution(bees) == "C"
    assert task().verify("pollen", bees).reason == "option C"
    # The label that the data set had for it means nothing here.
    assert task().verify("3", bees).reason == "unreadable: it names no option"
    assert task().verify("(b) seeds", bees).reason == "option B, not C"
    slope = by_question(task("agieval-sat-math").load("test"), "slope")
    assert slope.question.startswith("Which of these lines has the slope 2?\n\nA. $y = x + 2$\nB. $y = 2x - 7$\n")
    prime = by_question(task("mmlu-pro").load("test"), "prime")
    assert task().verify("J", prime).correct


def test_an_option_that_stands_there_twice_is_right_twice() -> None:
    norway = by_question(task().load("test"), "Norway")
    assert [task().verify(letter, norway).correct for letter in "ABCD"] == [True, False, True, False]
    assert task().verify("Oslo", norway).correct


def test_options_are_shuffled_by_seed_and_stay_where_they_speak_of_each_other() -> None:
    plain, one, again, two = task(), task(shuffle_seed=1), task(shuffle_seed=1, test=3), task(shuffle_seed=2)
    assert one.load("train") == again.load("train") != plain.load("train")
    assert again.load("test") == one.load("test")[:3]
    assert {p.id: p.question for p in one.load("train")} != {p.id: p.question for p in two.load("train")}
    for before, after in zip(plain.load("train"), one.load("train"), strict=True):
        assert before.id == after.id
        assert sorted(before.reference["options"]) == sorted(after.reference["options"])
        texts = [p.reference["options"][p.reference["right"]] for p in (before, after)]
        assert texts[0] == texts[1]
    assert len({p.reference["right"] for p in one.load("train")}) > 1
    true = by_question(one.load("test"), "Which statement is true?")
    assert true == by_question(plain.load("test"), "Which statement is true?")


def test_a_problem_is_its_question_and_its_options(tmp_path: Path) -> None:
    rows = [
        {"question": "Which?", "choices": ["a1", "b1", "c1"], "answer": 0},
        {"question": " which? ", "choices": ["c1", "a1", "b1"], "answer": 1},
        {"question": "Which?", "choices": ["a1", "b1", "d1"], "answer": "B"},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = task("mmlu-pro", path=str(tmp_path)).load("test")
    assert sorted(task().solution(p) or "" for p in problems) == ["A", "B"]


def test_bad_rows_are_named_all_at_once(tmp_path: Path) -> None:
    good = {"question": "Which?", "choices": ["a", "b"], "answer": 0}
    rows: list[Any] = [
        {**good, "question": " "},
        {**good, "choices": ["a"]},
        {**good, "choices": "a, b"},
        {**good, "choices": ["a", None]},
        {**good, "choices": ["a", float("nan")]},
        {**good, "answer": 2},
        {**good, "answer": True},
        {"question": "Which?", "options": ["a", "b"], "answer": "C"},
        {"question": "Which?", "options": ["a", "b"], "answer": "B", "answer_index": 0},
        {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"},
        {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "1"},
        {"question": "Which?", "A": "a"},
        {"query": 3, "choices": ["(A)a", "(B)b"], "gold": [1]},
        {"query": "Q: Which?", "choices": ["(A)a", "(B)b"], "gold": [0, 1]},
        {"query": "Q: Which?", "choices": ["(A)a"], "gold": [0]},
        good,
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError) as error:
        task(path=str(file)).load("train")
    lines = [re.sub(r"^  mine.jsonl:", "", line) for line in str(error.value).splitlines()]
    assert lines == [
        "15 bad rows:",
        "1: question must be text, not ' '",
        "2: choices must be a list of 2 to 26 texts, not \"['a']\"",
        "3: choices must be a list of 2 to 26 texts, not 'a, b'",
        "4: choices must be a list of 2 to 26 texts, not \"['a', None]\"",
        "5: choices must be a list of 2 to 26 texts, not \"['a', nan]\"",
        "6: answer must be 0 to B, not '2'",
        "7: answer must be 0 to B, not 'True'",
        "8: answer must be A to B, not 'C'",
        "9: answer is 'B', and answer_index '0'",
        "10: choices must hold text and label, lists of 2 to 26, not \"{'text': ['a', 'b'], 'label': ['A']}\"",
        "11: answerKey must be one of A, B, not '1'",
        "12: needs the columns of MMLU (question, choices, answer), MMLU-Pro (question, options, answer), ARC "
        "(question, choices, answerKey) or AGIEval (query, choices, gold); it has question, A",
        "13: query must be text, not '3'",
        "14: gold must be a list of one place, not '[0, 1]'",
        "15: choices must be a list of 2 to 26 texts, not \"['a']\"",
    ]


def test_files_may_be_called_as_on_the_hub(tmp_path: Path) -> None:
    for part in ("auxiliary_train", "validation", "test"):
        (tmp_path / f"{part}-00000-of-00001.jsonl").write_text((FIXTURES / f"mmlu/{part}.jsonl").read_text())
    (tmp_path / "dev-00000-of-00001.jsonl").write_text("not read\n")
    assert task(path=str(tmp_path)).data.splits == task().data.splits


def test_a_users_own_question_has_its_options_on_lines() -> None:
    made = task()
    own = made.read("Which is red?\n(a) grass\nb) blood\nC. snow\n")
    assert own.reference == {"options": ("grass", "blood", "snow"), "right": None}
    assert own.question.startswith("Which is red?\n\nA. grass\nB. blood\nC. snow\n\n")
    assert made.solution(own) is None
    assert made.verify("B", own).reason == "no reference answer is known"
    assert made.verify("D", own).reason == "unreadable: there is no option D"
    for text in ("", "Which is red?", "A. grass\nB. blood", "Which?\nA. grass"):
        with pytest.raises(TaskError, match="its options on lines of their own"):
            made.read(text)


def test_variants_keep_question_and_options() -> None:
    made = task()
    p = made.load("test")[0]
    variants = made.variants(p, 3)
    body = p.question.removesuffix("\n\nAnswer with the letter of the right option.")
    assert len({*variants, p.question}) == 4
    assert all(body in v for v in variants)
    drawn = made.training_problems(random.Random(0))
    assert {q.id for q in islice(drawn, 12)} == {q.id for q in made.load("train")}


@pytest.mark.parametrize(
    ("name", "task", "dataset"),
    [
        ("mmlu-qwen2.5-1.5b", "choice", "mmlu"),
        ("arc-qwen2.5-1.5b", "choice", "arc-challenge"),
        ("gsm8k-qwen2.5-1.5b", "maths", "gsm8k"),
    ],
)
def test_the_configs_are_valid_and_say_how_to_run_them(name: str, task: str, dataset: str) -> None:
    config = load_train_config(name)
    assert (config.task.name, config.task.settings["dataset"]) == (task, dataset)
    assert (config.cloud.settings["model"], config.budget) == ("deepseek-reasoner", 0.3)
    text = " ".join((resources.files("selfroute") / f"configs/{name}.toml").read_text().split())
    for part in (f"selfroute train {name}", "80 GB GPU", "USD in training", "docs/scale.md", "Not run", "our choice"):
        assert part in text
