"""Every data set, in its own columns, from a file to two training steps and an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfroute import api
from selfroute.config import Choice
from selfroute.protocol import chat
from selfroute.records import read_records
from selfroute.tasks import make_task
from selfroute.tasks.check import check
from selfroute.tasks.choice import CHOICE_SETS
from selfroute.tasks.code_rows import CODE_SETS
from selfroute.tasks.mathsets import MATH_SETS
from tests.clouds import splits

# One of the files is cut by hash, with exercises that are nearly alike.
pytestmark = pytest.mark.filterwarnings("ignore::selfroute.errors.DataWarning")
FIXTURES = Path(__file__).parents[1] / "fixtures"
SETS = {"maths": MATH_SETS, "choice": CHOICE_SETS, "code": CODE_SETS}
ALL = [(task, name) for task, sets in SETS.items() for name in sets]
TRAINED = [(task, name) for task, name in ALL if "train" in SETS[task][name].sizes]
TESTED = [pair for pair in ALL if pair not in TRAINED]
SMALL = [
    "steps=2", "problems_per_step=2", "num_responses=2", "sampling.max_tokens=16", "evaluation.max_tokens=16",
    "cloud.name=tests.clouds:SolvingCloud", "cloud.accuracy=1.0",
]  # fmt: skip


def named(task: str, name: str) -> Choice:
    return Choice(name=task, dataset=name, data_dir=str(FIXTURES / task))


def train(task: str, name: str, run: Path, *others: str) -> None:
    """Two steps; the cloud knows the answers of this data set and of some others of its task."""
    known = [named(task, one).model_dump() for one in (name, *others)]
    tables = ", ".join("{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in one.items()) + "}" for one in known)
    settings = [f"task.{key}={value}" for key, value in known[0].items()]
    config = api.load_train_config("countdown-tiny", [*settings, *SMALL, f"cloud.tasks=[{tables}]"])
    api.train(config, run)


@pytest.mark.parametrize(("task", "name"), ALL)
def test_problems_are_loaded_asked_and_verified(task: str, name: str, sandbox: object) -> None:
    made = make_task(named(task, name))
    found = splits(made)
    assert "test" in found
    assert ("train" in found) == ((task, name) in TRAINED)
    for problems in found.values():
        assert all(made.solution(p) for p in problems)
        assert all(chat(p.question)[-1]["content"] == p.question for p in problems)
        # An option that stands there twice is right by either letter.
        assert not list(filter(None, check(made, [p for p in problems if "Norway" not in p.question])))


@pytest.mark.parametrize(("task", "name"), TRAINED)
def test_two_steps_and_an_evaluation(task: str, name: str, tmp_path: Path, sandbox: object) -> None:
    train(task, name, tmp_path / "run")
    assert len(read_records(tmp_path / "run/metrics.jsonl")) == 2
    outcomes = api.evaluate(tmp_path / "run")
    assert len(outcomes) == len(make_task(named(task, name)).load("test"))
    assert all(o.cloud_correct and o.cloud_extracted and o.device_reason for o in outcomes)


@pytest.mark.parametrize("task", SETS)
def test_what_is_a_test_alone_tests_a_model_that_trained_on_another(task: str, tmp_path: Path, sandbox: object) -> None:
    names = [name for one, name in TESTED if one == task]
    trained = next(name for one, name in TRAINED if one == task)
    train(task, trained, tmp_path / "run", *names)
    for name in names:
        folder = api.benchmark(tmp_path / "run", [f"task.dataset={name}"])
        outcomes = api.evaluate(folder)
        assert len(outcomes) == len(make_task(named(task, name)).load("test"))
        assert all(o.cloud_correct and o.cloud_extracted for o in outcomes), name
