from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.clouds import FlakyOracle

from selfroute.compare.config import CompareConfig
from selfroute.compare.methods import OURS, TASK_TUNED
from selfroute.compare.results import load_testbed
from selfroute.compare.routing import fit_routers, route_test
from selfroute.compare.rows import methods_of, read_row, row_info, write_row
from selfroute.compare.run import Matrix, compare
from selfroute.config import validate
from selfroute.device.hf import HFEngine
from selfroute.device.load import model_path
from selfroute.errors import ConfigError, DivergenceError, RunError, TrainingError
from selfroute.protocol import chat
from selfroute.records import read_json, write_json
from selfroute.tasks.countdown import Countdown
from selfroute.tasks.provenance import provenance
from selfroute.train import loop
from selfroute.types import Problem, Split

TRAIN = {
    "task": {"name": "countdown", "train": 40, "calibration": 40, "test": 24},
    "steps": 1,
    "problems_per_step": 4,
    "num_responses": 4,
    "sampling": {"max_tokens": 100},
    "evaluation": {"max_tokens": 100},
}


def config(methods: list[str], **changes: Any) -> CompareConfig:
    train = {**TRAIN, **changes.pop("train", {})}
    values = {
        "testbed": "bed", "methods": methods, "seeds": [0], "fit_problems": 20, "num_samples": 2, "train": train,
        **changes,
    }  # fmt: skip
    return validate(CompareConfig, values, "test")


def stamps(out: Path) -> dict[str, int]:
    return {str(f.relative_to(out)): f.stat().st_mtime_ns for f in (out / "bed/rows").rglob("*") if f.is_file()}


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with a row of each kind."""
    out = tmp_path_factory.mktemp("compare")
    compare(config(["device_only", "cloud_only", OURS, "probe", "decision_votes"]), out)
    return out


def test_every_row_is_there_and_consistent(finished: Path) -> None:
    bed = finished / "bed"
    assert set(methods_of(bed)) == {"device_only", "cloud_only", TASK_TUNED, OURS, "probe", "decision_votes"}
    rows = {m: read_row(bed, m, 0) for m in methods_of(bed)}
    problems = [r.problem for r in rows[OURS].records]
    assert len(problems) == 24
    for row in rows.values():
        assert [r.problem for r in row.records] == problems
        # One cloud for all.
        assert [r.cloud_correct for r in row.records] == [r.cloud_correct for r in rows[OURS].records]
    assert not any(r.asked for r in rows["device_only"].records)
    assert all(r.asked for r in rows["cloud_only"].records)
    assert not any(r.asked for r in rows[TASK_TUNED].records)
    assert {r.asked for r in rows["probe"].records} == {None}
    assert len(rows[OURS].metrics) == 1
    assert all(r.response for r in rows[OURS].records)
    assert rows[OURS].info["threads"] >= 1
    assert all(row.info["seconds"] >= 0 for row in rows.values())
    assert len(read_json(bed / "testbed.json")["device_sha256"]) == 64
    # The probe looks at the very responses of the task-tuned row.
    assert [r.device_correct for r in rows["probe"].records] == [r.device_correct for r in rows[TASK_TUNED].records]
    assert all(r.score is None or 0 <= r.score <= 1 for r in rows["probe"].records)
    # Votes cost the tokens of all samples.
    mean = {m: sum(r.device_tokens for r in rows[m].records) for m in (OURS, "decision_votes")}
    assert mean["decision_votes"] > 1.5 * mean[OURS]


def test_a_rerun_does_nothing_and_a_new_method_pays_for_itself_alone(finished: Path) -> None:
    before = stamps(finished)
    compare(config(["device_only", "cloud_only", OURS, "probe", "decision_votes"]), finished)
    assert stamps(finished) == before
    compare(config([OURS, "probe", "naive_offloading", "gapg"]), finished)
    after = stamps(finished)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[2] for name in set(after) - set(before)} == {"naive_offloading", "gapg"}


def test_rows_made_with_other_settings_are_never_mixed(finished: Path) -> None:
    with pytest.raises(RunError, match=r"made with other settings \(train\.steps\): give another --out"):
        compare(config([OURS], train={"steps": 2}), finished)
    with pytest.raises(RunError, match=r"made with other settings \(num_samples\)"):
        compare(config([OURS], num_samples=3), finished)


def test_rows_of_an_earlier_version_count_what_came_since_at_its_default(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for file in (
        out / "bed/testbed.json",
        *(out / "bed/rows").glob("*/*.json"),
        *(out / "bed/runs").glob("*/*/run.json"),
    ):
        text = read_json(file)
        for settings in (text.get("train"), text.get("config")):
            if settings and "lr_end" in settings:
                del settings["lr_end"], settings["cloud"]["latency_s"]
        write_json(file, text)
    before = stamps(out)
    compare(config(["device_only", "cloud_only", OURS, "probe", "decision_votes", "naive_offloading"]), out)
    assert {name: stamps(out)[name] for name in before} == before
    with pytest.raises(RunError, match=r"made with other settings \(train\.lr_end\)"):
        compare(config([OURS], train={"lr_end": 0.5}), out)


class Watched(Countdown):
    """Countdown that keeps note of the splits that were loaded, and has no test problems while it is forbidden."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.loaded: list[Split] = []

    def load(self, split: Split) -> list[Problem]:
        self.loaded.append(split)
        assert split != "test", "a test problem was asked for before the test"
        return super().load(split)


class Listener:
    """Every prompt that an engine is given, however it gets there."""

    def __init__(self, engine: HFEngine) -> None:
        self.seen: set[tuple[int, ...]] = set()
        encode = engine.encode

        def listening(messages: Any) -> list[int]:
            ids = encode(messages)
            self.seen.add(tuple(ids))
            return ids

        engine.encode = listening  # type: ignore[method-assign]


@pytest.fixture
def fresh() -> HFEngine:
    """An engine of the test's own."""
    from selfroute.device.base import DeviceConfig

    return HFEngine.load(DeviceConfig(model="countdown-1m"))


EVERY_ROUTER = [
    "naive_offloading", "router", "router_encoder", "router_boosting", "log_probability", "self_consistency",
    "prompt_variants", "probe", "prompt_probe", "unanswered_first", "decision_votes",
]  # fmt: skip


def test_no_router_probe_or_calibration_sees_a_test_problem(fresh: HFEngine) -> None:
    settings = config(EVERY_ROUTER)
    task = Watched(Countdown(Countdown.Config(**settings.train.task.settings)).config)
    tests = Countdown(task.config).load("test")
    questions = [q for p in tests for q in (p.question, *task.variants(p, 6))]
    held_out = {tuple(fresh.encode(chat(q))) for q in questions}
    listener = Listener(fresh)
    fitted = fit_routers(EVERY_ROUTER, fresh, task, settings, 0, quiet)
    assert [f.method for f in fitted] == EVERY_ROUTER
    assert set(task.loaded) == {"train", "calibration"}
    assert len(listener.seen) > 50
    assert not listener.seen & held_out
    # The prompts are what would have been seen: routing the test shows them.
    from selfroute.cloud import make_cloud
    from selfroute.cloud.memory import Cloud

    cloud = Cloud(make_cloud(settings.train.cloud), Path(":memory:"))
    try:
        routed, answers = route_test(fitted, fresh, Countdown(task.config), cloud, settings, 0, quiet)
    finally:
        cloud.close()
    assert listener.seen & held_out
    assert set(routed) == set(EVERY_ROUTER)
    for method, records in routed.items():
        assert len(records) == 24, method
        assert all(r.score is not None and 0 <= r.score <= 1 for r in records), method
    # What has no readable answer is seen by those that look at responses, and by them alone.
    undecided = {m: sum(r.undecided for r in records) for m, records in routed.items()}
    prompt_only = ("naive_offloading", "router", "router_encoder", "router_boosting", "prompt_probe")
    assert all(undecided[m] == 0 for m in prompt_only)
    unanswered = sum(r.answer is None for r in routed["probe"])
    assert unanswered > 0
    assert all(undecided[m] == unanswered for m in ("log_probability", "probe", "unanswered_first"))
    assert answers == [r.answer for r in routed["probe"]]
    # Each is charged with the responses that it needs.
    fits = {f.method: f.info["fit"] for f in fitted}
    tokens = {m: fit["device_tokens"] for m, fit in fits.items()}
    assert tokens["naive_offloading"] == 0
    assert tokens["self_consistency"] > tokens["log_probability"] == tokens["unanswered_first"] > 0
    assert tokens["router_encoder"] == tokens["router_boosting"] == tokens["prompt_probe"] > 0
    assert tokens["router"] == tokens["probe"] == tokens["router_encoder"] + tokens["log_probability"]
    for clock in ("seconds", "cpu_seconds"):
        assert fits["router"][clock] > max(fits[m][clock] for m in ("router_encoder", "router_boosting"))
    chosen = next(f for f in fitted if f.method == "router").info["chosen"]
    assert [r.score for r in routed["router"]] == [r.score for r in routed[chosen]]


@pytest.mark.parametrize("method", [OURS, TASK_TUNED])
def test_nothing_before_the_test_loads_a_test_problem(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole row: neither training, the search nor our calibration loads them, whatever task they make themselves."""
    settings = config([method], lrs=[1e-4, 2e-4])
    matrix = Matrix(settings, tmp_path, quiet)
    loaded: list[Split] = []
    load, tested = Countdown.load, matrix._evaluate

    def watched(self: Countdown, split: Split) -> list[Problem]:
        loaded.append(split)
        assert split != "test", "a test problem was asked for before the test"
        return load(self, split)

    def then_allow(*args: Any, **how: Any) -> Any:
        assert set(loaded) == {"train", "calibration"}
        monkeypatch.setattr(Countdown, "load", load)
        return tested(*args, **how)

    # A run keeps a hash of all its problems, and nothing else of the test's.
    monkeypatch.setattr(
        loop, "provenance", lambda task, *splits: provenance(task, *(split for split in splits if split != "test"))
    )
    monkeypatch.setattr(Countdown, "load", watched)
    monkeypatch.setattr(matrix, "_evaluate", then_allow)
    matrix._trained(method, 0)
    row = row_info(tmp_path, method, 0)
    assert row is not None
    search = read_json(tmp_path / f"search/{method}.json")
    assert row["config"]["lr"] == search["chosen"]
    assert set(search["tried"]) == {"0.0001", "0.0002"}
    best = search["tried"][f"{search['chosen']:g}"]["validation"]
    assert best == max(t["validation"] for t in search["tried"].values())
    # The cloud was asked about each calibration problem, for each rate; of the device alone nothing is asked.
    calls = [t["validated"]["cloud_calls"] for t in search["tried"].values()]
    assert calls == ([40, 40] if method == OURS else [0, 0])
    if method == OURS:
        assert row["calibration"]["problems"] == 40


def test_a_row_whose_model_was_made_anew_is_not_mixed_with_the_old(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    compare(config([OURS, "probe", "decision_votes"]), out)
    for method, base in (("probe", TASK_TUNED), ("decision_votes", OURS)):
        row = read_row(out / "bed", method, 0)
        written = {k: v for k, v in row.info.items() if k not in ("schema", "method", "seed")}
        write_row(out / "bed", method, 0, {**written, "config": {**written["config"], "lr": 9.0}}, row.records)
        for refused in (lambda: compare(config([OURS, "probe"]), out), lambda: load_testbed(out / "bed")):
            with pytest.raises(RunError, match=rf"{method}, seed 0, .* another model than that of {base}"):
                refused()
        if method == "probe":
            others = [replace(r, answer="1") for r in row.records]
            write_row(out / "bed", method, 0, written, others)
            with pytest.raises(RunError, match="another model than that of task_tuning"):
                load_testbed(out / "bed")
        write_row(out / "bed", method, 0, written, row.records)
    load_testbed(out / "bed")


def test_a_row_in_anothers_place_is_refused(finished: Path, tmp_path: Path) -> None:
    bed = tmp_path / "bed"
    shutil.copytree(finished / "bed", bed)
    for file in (bed / "rows/probe").glob("seed-0.*"):
        shutil.copy(file, file.with_name(file.name.replace("seed-0", "seed-1")))
    with pytest.raises(RunError, match="probe, seed 1, is the row probe, seed 0"):
        load_testbed(bed)


class Diverging(Matrix):
    """A matrix whose training diverges at learning rates of 1 and more."""

    def _train(self, method: str, config: Any, progress: Any) -> Path:
        if config.lr >= 1:
            raise DivergenceError("the loss is nan at step 1")
        return super()._train(method, config, progress)


def test_a_rate_that_diverges_is_ruled_out(tmp_path: Path) -> None:
    assert Diverging(config([OURS], lrs=[1.0, 1e-4]), tmp_path / "a", quiet)._choose_lr(OURS, quiet) == 1e-4
    tried = read_json(tmp_path / f"a/search/{OURS}.json")["tried"]
    assert tried["1"].items() >= {"validation": None, "error": "the loss is nan at step 1", "ledger": None}.items()
    with pytest.raises(DivergenceError, match="diverges at every learning rate"):
        Diverging(config([OURS], lrs=[1.0, 2.0]), tmp_path / "b", quiet)._choose_lr(OURS, quiet)


def test_a_search_under_other_settings_is_refused(tmp_path: Path) -> None:
    settings = config([OURS], lrs=[1e-4, 2e-4])
    Matrix(settings, tmp_path, quiet)._choose_lr(OURS, quiet)
    file = tmp_path / f"search/{OURS}.json"
    known = read_json(file)
    tried = known["tried"]["0.0001"]["config"]
    tried["sampling"]["forbid_help"] = False
    write_json(file, known)
    with pytest.raises(RunError, match=rf"{OURS}\.json was made with other settings \(sampling\)"):
        Matrix(settings, tmp_path, quiet)._choose_lr(OURS, quiet)
    # An earlier version kept no settings there, but in the rows.
    for one in known["tried"].values():
        del one["config"]
    write_json(file, known)
    with pytest.raises(RunError, match="does not say with which settings: remove it"):
        Matrix(settings, tmp_path, quiet)._choose_lr(OURS, quiet)
    write_row(tmp_path, OURS, 0, {"config": tried}, [])
    with pytest.raises(RunError, match=rf"rows/{OURS} was made with other settings \(sampling\)"):
        Matrix(settings, tmp_path, quiet)._choose_lr(OURS, quiet)
    tried["sampling"]["forbid_help"] = True
    write_row(tmp_path, OURS, 0, {"config": tried}, [])
    assert Matrix(settings, tmp_path, quiet)._choose_lr(OURS, quiet) == known["chosen"]


class Full(Matrix):
    """A matrix whose disk is full."""

    def _train(self, method: str, config: Any, progress: Any) -> Path:
        raise TrainingError("cannot write metrics.jsonl: No space left on device")


def test_a_full_disk_rules_no_rate_out(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No space left"):
        Full(config([OURS], lrs=[1e-4, 2e-4]), tmp_path, quiet)._choose_lr(OURS, quiet)
    assert not (tmp_path / "search").exists()


def test_other_weights_under_the_same_name_are_not_mixed_in(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_path("countdown-1m"), model)
    settings = config(["device_only"], train={"device": {"model": str(model)}})
    compare(settings, tmp_path / "out")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"other settings \(device_sha256\)"):
        compare(settings, tmp_path / "out")


def test_rows_of_other_problems_are_never_mixed(tmp_path: Path) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    problems = [draw for n in range(2, 60) for draw in ((n, n + 1, 3 * n + 1), (n, n + 2, 3 * n + 2))]

    def write(rows: list[tuple[int, int, int]]) -> None:
        file.write_text("".join(f'{{"nums": [{a}, {b}, {a}], "target": {c}}}\n' for a, b, c in rows))

    write(problems)
    settings = config(["device_only"], train={"task": {"name": "countdown", "path": str(file)}})
    compare(settings, out)
    changed = r"bed was made with other train problems \(\d+, now \d+\) from .*: bring them back, or give another --out"
    write(problems[: len(problems) // 2])
    with pytest.raises(RunError, match=changed):
        compare(settings, out)
    # A comparison of an earlier version has no hash, but names.
    known = read_json(out / "bed/testbed.json")
    write_json(out / "bed/testbed.json", {k: v for k, v in known.items() if k != "data"})
    with pytest.raises(RunError, match=r"the row device_only in .*bed is of other test problems \(\d+, now \d+\)"):
        compare(settings, out)
    write(problems)
    before = stamps(out)
    compare(settings, out)
    assert stamps(out) == before
    assert read_json(out / "bed/testbed.json") == known


def test_routers_refuse_a_model_that_is_not_that_of_the_row(tmp_path: Path) -> None:
    compare(config([TASK_TUNED]), tmp_path)
    bed = tmp_path / "bed"
    row = read_row(bed, TASK_TUNED, 0)
    other = [replace(r, answer="1") for r in row.records]
    write_row(bed, TASK_TUNED, 0, {"config": row.info["config"], "ledger": row.info["ledger"]}, other, row.metrics)
    shutil.rmtree(bed / "runs")
    # The votes of several responses are not the row's, but the first response is.
    for router in ("probe", "self_consistency"):
        with pytest.raises(RunError, match="is not that of the row that is there"):
            compare(config([TASK_TUNED, router]), tmp_path)


@pytest.mark.parametrize(("base", "router"), [(TASK_TUNED, "probe"), (OURS, "decision_votes")])
def test_routers_refuse_other_weights_than_those_of_the_row(base: str, router: str, tmp_path: Path) -> None:
    compare(config([base]), tmp_path)
    file = tmp_path / f"bed/rows/{base}/seed-0.json"
    write_json(file, {**read_json(file), "weights_sha256": "0" * 64})
    with pytest.raises(RunError, match=f"the model of {base}, seed 0, trained again, is not that of the row"):
        compare(config([base, router]), tmp_path)


def test_too_few_calibration_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too few for a budget"):
        compare(config([OURS], train={"task": {"name": "countdown", "calibration": 3}}), tmp_path)
    assert not (tmp_path / "bed/runs").exists()


def test_equal_ablations_train_once_and_clouds_are_swapped(tmp_path: Path) -> None:
    settings = config(
        [],
        ablations={
            "cloud=0.5": {"cloud": {"accuracy": 0.5}},
            "G=4": {"num_responses": 4},
            "cloud=0.95": {"cloud": {"accuracy": 0.95}},
        },
        swap_clouds=[{"name": "oracle", "accuracy": 1.0}],
    )
    compare(settings, tmp_path)
    bed = tmp_path / "bed"
    assert sorted(p.name for p in (bed / "runs").iterdir()) == ["G=4", "cloud=0.5"]
    same = row_info(bed, "cloud=0.95", 0)
    assert same is not None
    assert same["same_as"] == "G=4"
    assert read_row(bed, "cloud=0.95", 0).records == read_row(bed, "G=4", 0).records
    half, swapped = read_row(bed, "cloud=0.5", 0), read_row(bed, "cloud=0.5@accuracy=1.0", 0)
    assert [r.device_correct for r in half.records] == [r.device_correct for r in swapped.records]
    assert all(r.cloud_correct for r in swapped.records)
    assert not all(r.cloud_correct for r in half.records)
    info = row_info(bed, "cloud=0.95@accuracy=1.0", 0)
    assert info is not None
    write_json(bed / "rows/cloud=0.95@accuracy=1.0/seed-0.json", {**info, "swapped_cloud": {"name": "other"}})
    with pytest.raises(RunError, match="is of another cloud"):
        compare(settings, tmp_path)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_ablation_that_changes_nothing_is_a_copy_of_ours(jobs: int, tmp_path: Path) -> None:
    ablations = {"G=4": {"num_responses": 4}, "lr=0.001": {"lr": 1e-3}}
    compare(config([OURS], ablations=ablations), tmp_path, jobs=jobs)
    bed = tmp_path / "bed"
    assert sorted(p.name for p in (bed / "runs").iterdir()) == [OURS, "lr=0.001"]
    copy = row_info(bed, "G=4", 0)
    assert copy is not None
    assert copy["same_as"] == OURS


def test_what_is_finished_stays_when_the_cloud_fails(tmp_path: Path) -> None:
    from selfroute.errors import CloudError

    down = tmp_path / "down"
    flaky = {"name": f"{FlakyOracle.__module__}:FlakyOracle", "broken": str(down)}
    settings = config(["device_only", OURS], train={"cloud": flaky})

    def fail_later(what: str, done: int, total: int) -> None:
        if f"{OURS}, seed 0: training" in what:
            down.touch()

    with pytest.raises(CloudError):
        compare(settings, tmp_path / "out", progress=fail_later)
    bed = tmp_path / "out/bed"
    kept = stamps(tmp_path / "out")
    assert row_info(bed, "device_only", 0) is not None
    assert row_info(bed, OURS, 0) is None
    down.unlink()
    compare(settings, tmp_path / "out")
    assert row_info(bed, OURS, 0) is not None
    assert {name: stamps(tmp_path / "out")[name] for name in kept} == kept
