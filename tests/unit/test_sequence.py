from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from selfroute import sequence
from selfroute.config import validate
from selfroute.errors import CloudError, ConfigError, DataWarning, RunError
from selfroute.evaluate.run import Outcome, write_outcomes
from selfroute.records import read_json, write_json
from selfroute.sequence import SequenceConfig, Stage, stages, summarise
from selfroute.tasks.addition import Addition
from selfroute.types import Problem, Split

COUNTDOWN = {"name": "countdown", "train": 20, "calibration": 5, "test": 5}
ADDITION = {"name": "addition", "train": 20, "calibration": 5, "test": 5}


def config(*entries: dict[str, Any], **train: Any) -> SequenceConfig:
    return SequenceConfig.model_validate({"stages": entries, "train": train})


def test_each_stage_begins_where_the_one_before_ends(tmp_path: Path) -> None:
    made = stages(
        config(
            {"task": COUNTDOWN}, {"task": ADDITION, "name": "sums", "steps": 7, "max_tokens": 30}, {"task": COUNTDOWN},
            steps=5, lr=1e-3, device={"model": "countdown-1m"},
        ),
        tmp_path / "out",
    )  # fmt: skip
    assert list(made) == ["1-countdown", "2-sums", "3-countdown"]
    one, two, three = made.values()
    assert (one.device.model, one.steps, one.lr, one.task.settings["train"]) == ("countdown-1m", 5, 1e-3, 20)
    assert two.device.model == str(tmp_path / "out/1-countdown/checkpoints/step-000005")
    assert (two.steps, two.sampling.max_tokens, two.evaluation.max_tokens) == (7, 30, 30)
    assert three.device.model == str(tmp_path / "out/2-sums/checkpoints/step-000007")
    assert (three.steps, three.sampling.max_tokens) == (5, 160)
    # Every default is written out.
    assert three.cloud.settings["latency_s"] == 2.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": [{"task": COUNTDOWN}]}, "at least 2 items"),
        ({"stages": [{"task": COUNTDOWN}, {"steps": 3}]}, r"stages.1.task: Field required"),
        ({"stages": [{"task": COUNTDOWN}] * 2, "steps": 3}, "steps: Extra inputs"),
        ({"stages": [{"task": COUNTDOWN}] * 2, "train": {"task": COUNTDOWN}}, "leave train.task out"),
        ({"stages": [{"task": COUNTDOWN, "name": "../x"}] * 2}, "stages.0.name"),
        ({"stages": [{"task": COUNTDOWN, "name": ""}] * 2}, "stages.0.name"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(SequenceConfig, given, "it")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "nope"}, "no such choice: 'nope'"),
        ({**COUNTDOWN, "nubmer_max": 3}, r"task.nubmer_max: .*did you mean task.number_max\?"),
        ({"name": "code", "path": "x"}, r"stage 2-code cannot be used:(?s:.*)the cloud 'oracle' has exact solvers"),
    ],
)
def test_a_stage_that_cannot_be_is_named_before_anything_is_done(
    tmp_path: Path, task: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sequence.train(config({"task": COUNTDOWN}, {"task": task}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_configs_that_are_sequences_are_known(tmp_path: Path) -> None:
    assert sequence.is_sequence("sequence-countdown-345")
    assert not sequence.is_sequence("countdown-tiny")
    assert sequence.load_config("sequence-countdown-345", ["train.steps=3"]).train.steps == 3
    for name in ("sequence-countdown-345", "sequence-math-code-qwen2.5-3b"):
        assert len(stages(sequence.load_config(name), tmp_path)) >= 2
    for kind in (SequenceConfig, Stage):
        assert all(field.description for field in kind.model_fields.values())


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        sequence.train(config({"task": COUNTDOWN}, {"task": ADDITION}), tmp_path / "out")


def test_test_problems_that_another_stage_trains_on_are_told() -> None:
    leaky = {**ADDITION, "name": "tests.unit.test_sequence:Leaky"}
    runs = stages(config({"task": ADDITION, "name": "a"}, {"task": leaky, "name": "b"}), Path("out"))
    with pytest.warns(DataWarning, match=r"^1-a trains on 20 of the 20 test problems of 2-b$") as told:
        sequence._check_problems(runs)
    assert len(told) == 1


def test_a_stage_whose_questions_the_cloud_cannot_answer_is_found_out_before_the_first_begins(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("".join(f'{{"q": "Where is {n}?", "a": "there"}}\n' for n in range(60)))
    mine = {"name": "custom", "path": str(tmp_path / "mine.jsonl"), "verifier": "exact"}
    mine |= {"columns": {"question": "q", "answer": "a"}}
    with pytest.raises(CloudError, match=r"Countdown and addition questions only, not 'Where is .*: name a real one"):
        sequence.train(config({"task": ADDITION}, {"task": mine}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sequence_that_was_moved_goes_on_and_another_first_stage_is_another(tmp_path: Path) -> None:
    small = {"steps": 1, "problems_per_step": 2, "num_responses": 2}
    made = config({"task": COUNTDOWN, "max_tokens": 40}, {"task": ADDITION, "max_tokens": 20}, **small)
    before = sequence.train(made, tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert sequence.train(made, tmp_path / "new", resume=True) == before
    stage = tmp_path / "new/2-addition"
    for run in (stage, stage / "benchmarks/1-countdown"):
        began = read_json(run / "run.json")["config"]["device"]["model"]
        assert began == str(tmp_path / "new/1-countdown/checkpoints/step-000001")
    other = config({"task": COUNTDOWN, "max_tokens": 40, "name": "x"}, {"task": ADDITION, "max_tokens": 20}, **small)
    with pytest.raises(RunError, match=r"2-addition was made with other settings \(device\)"):
        sequence.train(other, tmp_path / "new", resume=True)


class Leaky(Addition):
    """Tests on what the addition task trains on."""

    def load(self, split: Split) -> list[Problem]:
        return super().load("train") if split == "test" else []


def outcome(problem: str, route: str, device: bool, cloud: bool) -> Outcome:
    return Outcome(
        problem=problem, question="?", response="", route=route, score=0.0,  # type: ignore[arg-type]
        correct=cloud if route == "cloud" else device, device_answer="", device_correct=device, device_reason="",
        device_solve_share=None, cloud_answer="", cloud_correct=cloud, cloud_reason="", device_tokens=1, cloud_tokens=1,
        cloud_cost_usd=0.0, cloud_latency_s=0.0,
    )  # fmt: skip


def write_test(folder: Path, *rows: tuple[str, bool, bool]) -> None:
    outcomes = [outcome(f"p{n}", *row) for n, row in enumerate(rows)]
    write_outcomes(folder / "evaluations/after/records.jsonl", outcomes)


def test_what_was_learned_and_forgotten(tmp_path: Path) -> None:
    right, wrong, asked = ("device", True, True), ("device", False, True), ("cloud", False, True)
    write_test(tmp_path / "1-a", right, right, asked, wrong)
    write_test(tmp_path / "2-b", right, wrong)
    write_test(tmp_path / "2-b/benchmarks/1-a", right, wrong, asked, wrong)
    found = summarise(tmp_path, ["1-a", "2-b"])
    cells = {(c["stage"], c["task"]): c for c in found["cells"]}
    assert set(cells) == {("1-a", "1-a"), ("2-b", "1-a"), ("2-b", "2-b")}
    values = {key: [c[m]["value"] for m in ("accuracy", "call_rate", "local_accuracy")] for key, c in cells.items()}
    assert values == {
        ("1-a", "1-a"): [0.75, 0.25, 0.5], ("2-b", "1-a"): [0.5, 0.25, 0.25], ("2-b", "2-b"): [0.5, 0.0, 0.5],
    }  # fmt: skip
    first, second = found["tasks"]
    assert (first["during"]["accuracy"]["value"], first["after_all"]["accuracy"]["value"]) == (0.75, 0.5)
    assert first["forgotten"]["value"] == 0.25
    assert first["forgotten"]["low"] < 0.25 < first["forgotten"]["high"]
    assert second["forgotten"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    tables = sequence.terminal_tables(found)
    assert [table.row_count for table in tables] == [2, 2]


def test_a_report_reads_the_records_again(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no sequence\.json yet"):
        sequence.report(tmp_path)
    write_test(tmp_path / "1-a", ("device", True, True))
    write_json(tmp_path / "sequence.json", {"stages": ["1-a"]})
    found = sequence.report(tmp_path)
    assert found["tasks"][0]["during"]["accuracy"]["value"] == 1.0
    assert read_json(tmp_path / "sequence.json") == found
