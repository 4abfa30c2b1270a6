"""The maths task on fixture files in each data set's own columns."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from selfroute.config import Choice
from selfroute.errors import ConfigError, DataWarning, TaskError
from selfroute.task_commands import app
from selfroute.tasks import make_task
from selfroute.tasks.check import check
from selfroute.tasks.maths import Maths, MathsConfig
from selfroute.tasks.mathsets import MATH_SETS
from selfroute.types import Problem

FIXTURES = Path(__file__).parents[2] / "fixtures/maths"


def task(dataset: str = "math-lighteval", **settings: Any) -> Maths:
    settings.setdefault("data_dir", None if "path" in settings else str(FIXTURES))
    made = make_task(Choice(name="maths", dataset=dataset, **settings))
    assert isinstance(made, Maths)
    return made


def by_question(problems: list[Problem], text: str) -> Problem:
    [found] = [p for p in problems if text in p.question]
    return found


def test_every_setting_has_a_row_and_every_row_a_setting() -> None:
    assert set(get_args(MathsConfig.model_fields["dataset"].annotation)) == set(MATH_SETS)
    for about in MATH_SETS.values():
        assert all(set(about.sizes) == set(hub.parts) for hub in about.hubs)
        assert about.licence
    with pytest.raises(ConfigError, match="dataset"):
        task("mmlu")


@pytest.mark.parametrize(
    ("dataset", "test", "train"),
    [
        ("math-lighteval", 6, 28),
        ("math-500", 4, 0),
        ("agieval-math", 3, 0),
        ("amc23", 3, 0),
        ("aime24", 2, 0),
        ("aime25", 2, 0),
        ("minervamath", 3, 0),
        ("gsm8k", 2, 8),
    ],
)
def test_each_layout_loads_and_its_references_verify_themselves_alone(dataset: str, test: int, train: int) -> None:
    made = task(dataset)
    problems = made.load("test")
    assert len(problems) == test
    assert not any(check(made, problems))
    assert all(p.question.endswith(r"Give the final answer as \boxed{...}.") for p in problems)
    if train:
        learned = made.load("train") + made.load("calibration")
        assert len(learned) == train
        assert not any(check(made, learned))
        assert not {p.id for p in learned} & {p.id for p in problems}
    else:
        with pytest.raises(TaskError, match=f"{dataset} holds test problems only: .*task.dataset=math-lighteval"):
            made.load("train")


def test_references_are_got_as_each_set_has_them() -> None:
    def answers(dataset: str, text: str) -> tuple[str, ...]:
        found: tuple[str, ...] = by_question(task(dataset).load("test"), text).reference["answers"]
        return found

    assert answers("math-lighteval", "lowest terms") == (r"\frac{3}{4}",)
    assert answers("amc23", "cubed") == ("27.0",)
    assert answers("aime24", "three digits") == ("033",)
    assert answers("aime25", "two weeks") == ("14",)
    assert answers("minervamath", "square root") == (r"\frac{1}{\sqrt{q}}", "q^{-1/2}")
    assert answers("gsm8k", "town") == ("1,234",)
    west = by_question(task("agieval-math").load("test"), "sun")
    assert west.question == "In which direction does the sun set?\n\nGive the final answer as \\boxed{...}."


def test_verdicts_know_their_question() -> None:
    made = task()
    problems = made.load("test") + made.load("train") + made.load("calibration")
    lowest, percent = by_question(problems, "lowest terms"), by_question(problems, "What percent")
    assert made.verify("0.75", lowest).correct
    assert made.verify(r"\boxed{\frac{6}{8}}", lowest).reason == r"not worked out: the fraction \frac{6}{8}"
    assert made.verify("15", percent).correct
    assert made.verify("(u+3)(u-3)", by_question(problems, "Factor")).correct
    assert made.verify("u^2-9", by_question(problems, "Factor")).reason == "not worked out: it stands in the question"


def test_splits_do_not_depend_on_the_order_or_the_format_of_a_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    rows = [json.loads(line) for line in (FIXTURES / "math-lighteval/train.jsonl").read_text().splitlines()]
    random.Random(3).shuffle(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "all.parquet")
    (tmp_path / "all.json").write_text(json.dumps(rows))
    splits = ("train", "calibration", "test")
    whole = task(path=str(tmp_path / "all.parquet"))
    cut = {split: whole.load(split) for split in splits if whole.data.splits[split]}
    assert sum(map(len, cut.values())) == 28
    assert len({p.id for problems in cut.values() for p in problems}) == 28
    again = task(path=str(tmp_path / "all.json"))
    assert {split: again.load(split) for split in cut} == cut
    # With test problems of its own, those that the hash would test are trained on.
    apart = task()
    assert {p.id for p in apart.load("calibration")} == {p.id for p in cut["calibration"]}
    assert len(apart.load("train")) == len(cut["train"]) + len(cut["test"])
    assert apart.load("test") == sorted(apart.load("test"), key=lambda p: p.id)


def test_sizes_are_at_most_what_is_asked_for() -> None:
    made = task(train=5, test=2)
    assert len(made.load("train")) == 5
    assert len(made.load("test")) == 2
    assert task().load("test")[:2] == made.load("test")


def test_training_problems_go_round_in_new_orders_and_are_training_problems() -> None:
    made = task(train=5)
    drawn = [p.id for p in islice(made.training_problems(random.Random(1)), 15)]
    rounds = [drawn[:5], drawn[5:10], drawn[10:]]
    assert [sorted(r) for r in rounds] == [sorted(p.id for p in made.load("train"))] * 3
    assert rounds[0] != rounds[1] != rounds[2]
    assert drawn == [p.id for p in islice(made.training_problems(random.Random(1)), 15)]


def test_test_problems_among_those_for_training_are_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "math-lighteval"
    shutil.copytree(FIXTURES / "math-lighteval", folder)
    leaked = json.loads((folder / "test.jsonl").read_text().splitlines()[0])
    leaked["problem"] = "  " + leaked["problem"].replace("$", "")
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps(leaked) + "\n")
    with pytest.warns(DataWarning, match="1 training problems are test problems too: they are left out of training"):
        made = task(data_dir=str(tmp_path)).load("train")
    assert {p.id for p in made} == {p.id for p in task().load("train")}
    # Of a set that is tested on, a part of MATH's test problems is nothing to warn of.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task("math-500").load("test")


def test_problems_that_all_but_repeat_a_test_problem_stay_with_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    shutil.copytree(FIXTURES / "gsm8k", folder)
    with (folder / "train.jsonl").open("a") as file:
        for who, more in (("Bob", " Why?"), ("Ann", "")):
            question = f"{who} shares 18 sweets among 3 friends. How many does each get?{more}"
            file.write(json.dumps({"question": question, "answer": "#### 6"}) + "\n")
    made = task("gsm8k", data_dir=str(tmp_path))
    with pytest.warns(DataWarning, match="2 training problems all but repeat a test problem, such as maths-"):
        # One of the two may be calibration's by its hash.
        count = len(made.load("train"))
    assert [b.question[:3] for _, b in made.data.near] == ["Bob"] * 2
    assert {a.id for a, _ in made.data.near} <= {p.id for p in made.data.splits["train"]}
    assert count == len(made.data.splits["train"])
    said = CliRunner().invoke(app, ["check", "maths", "dataset=gsm8k", f"data_dir={tmp_path}"]).output
    assert "2 training problems all but repeat a test problem:" in said
    assert "Ann shares 18 sweets among 3 friends." in said
    assert "all 2 problems pass" in said
    with pytest.warns(DataWarning, match="all but repeat a test problem"):
        said = (
            CliRunner().invoke(app, ["show", "maths", "dataset=gsm8k", f"data_dir={tmp_path}", "--split=train"]).output
        )
    assert f"train: {count} problems\n" in said
    assert said.count("  user ") == 3


def test_bad_rows_are_named_all_at_once(tmp_path: Path) -> None:
    rows = [
        '{"problem": "Fine?", "solution": "\\\\boxed{1}"}',
        "not json",
        "[1, 2]",
        '{"problem": "No box?", "solution": "one"}',
        '{"problem": "", "solution": "\\\\boxed{1}"}',
        '{"problem": 3, "solution": "\\\\boxed{1}"}',
        '{"problem": "Empty box?", "solution": "\\\\boxed{}"}',
        '{"question": "Another layout?", "answer": "1"}',
        '{"problem": "None?", "solution": null}',
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(rows))
    with pytest.raises(TaskError) as error:
        task(path=str(file)).load("train")
    assert str(error.value).splitlines() == [
        "8 bad rows:",
        "  mine.jsonl:2: is not JSON: Expecting value: line 1 column 1 (char 0)",
        "  mine.jsonl:3: must be an object with columns, not list",
        r"  mine.jsonl:4: solution has no \boxed{} answer",
        "  mine.jsonl:5: problem must be text, not ''",
        "  mine.jsonl:6: problem must be text, not '3'",
        "  mine.jsonl:7: solution holds an empty answer",
        "  mine.jsonl:8: needs the columns 'problem' and 'solution'; it has question, answer",
        "  mine.jsonl:9: solution must be text or a number, not 'None'",
    ]
    # As numbers that are missing are written.
    file.write_text('{"problem": "NaN?", "answer": NaN}')
    with pytest.raises(TaskError, match=r"mine.jsonl:1: answer must be text or a number, not 'nan'"):
        task(path=str(file), dataset="math-500").load("test")
    file.write_text("\n".join([rows[3]] * 1200))
    with pytest.raises(TaskError, match=r"1,200 bad rows:(\n  mine.*){100}\n  and 1,100 more"):
        task(path=str(file)).load("train")


def test_a_copy_without_answers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "minerva.jsonl"
    file.write_text('{"question": "How far?", "solution": "5 m"}\n')
    with pytest.raises(TaskError, match="needs the columns 'question' and 'answer'; it has question, solution"):
        task("minervamath", path=str(file)).load("test")


def test_an_empty_split_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"problem": "One?", "solution": "\\\\boxed{1}"}\n')
    made = task(path=str(file))
    for split in ("train", "calibration", "test"):
        if not made.data.splits[split]:
            with pytest.raises(TaskError, match=f"holds no {split} problem of math-lighteval: give more, or train and"):
                made.load(split)


def test_without_a_network_the_error_says_what_to_fetch_and_how() -> None:
    with pytest.raises(TaskError) as error:
        make_task(Choice(name="maths", revision="abc123", data_dir=str(FIXTURES / "none"))).load("test")
    message = str(error.value)
    for part in (
        "DigitalLearningGmbH/MATH-lighteval (config default, split train, revision abc123)",
        "load_dataset('DigitalLearningGmbH/MATH-lighteval', 'default', split='test', revision='abc123')",
        "DIR/math-lighteval/train.jsonl and test.jsonl",
        "task.data_dir=DIR",
        "task.path",
    ):
        assert part in message


def test_a_users_own_problem_has_no_reference_to_be_right_by() -> None:
    made = task()
    own = made.read("What is 3/4 of 28?")
    assert own.question.startswith("What is 3/4 of 28?")
    assert made.solution(own) is None
    assert made.verify("21", own).reason == "no reference answer is known"
    with pytest.raises(TaskError, match="need a problem"):
        made.read("  ")


def test_variants_ask_the_same_in_other_words() -> None:
    made = task()
    p = by_question(made.load("test"), "Factor")
    variants = made.variants(p, 3)
    assert len(set(variants)) == 3
    assert all("Factor $u^2-9$." in v and r"\boxed{...}" in v and v != p.question for v in variants)
    assert made.variants(p, 0) == []
    assert made.canonical(r"\boxed{\frac{2}{4}}") == made.canonical("0.5")
