"""The code task through training and evaluation; the device model writes no programs, the cloud does."""

from __future__ import annotations

from pathlib import Path

from selfroute import api
from tests.programs import taco, write_rows

FIXTURES = Path(__file__).parents[1] / "fixtures/code"
RIGHT = "print(sum(map(int, input().split())))"


def test_two_steps_and_an_evaluation_on_programs(tmp_path: Path) -> None:
    rows = [taco(f"Add ({n}).", ["1 2\n", "3 4\n"], ["3\n", "7\n" if n % 3 else "8\n"]) for n in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = api.load_train_config(
        "countdown-tiny",
        [
            "task.name=code", f"task.path={path}", "cloud.name=tests.clouds:ProgramCloud", f"cloud.program={RIGHT!r}",
            "steps=2", "problems_per_step=4", "num_responses=2", "sampling.max_tokens=24", "evaluation.max_tokens=24",
        ],
    )  # fmt: skip
    api.train(config, tmp_path / "run")
    outcomes = api.evaluate(tmp_path / "run")
    assert len(outcomes) >= 3
    for outcome in outcomes:
        number = int(outcome.question.split("(")[1].split(")")[0])
        assert outcome.cloud_correct == (number % 3 != 0)
        assert outcome.cloud_reason == (
            "passes all 2 cases" if number % 3 else "case 2: wrong output: got '7' in line 1, expected '8'"
        )
        assert not outcome.device_correct
    folder = api.benchmark(tmp_path / "run", ["task.dataset=humaneval", f"task.data_dir={FIXTURES}"])
    assert [outcome.cloud_correct for outcome in api.evaluate(folder)] == [False, False]
