"""Run a comparison: every method on the same problems, seeds and budget, each finished row kept.

Rows that are already in the folder are not done again, and a training that was cut goes on from its last checkpoint, so
a rerun pays only for what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from selfroute.cloud import check_questions, make_cloud
from selfroute.cloud.memory import Cloud, open_judge, spent_by_phase
from selfroute.compare.checks import (
    check_answers,
    check_bases,
    check_trained,
    check_tried,
    check_weights,
    weights,
)
from selfroute.compare.config import CompareConfig, brief
from selfroute.compare.jobs import run_parts
from selfroute.compare.methods import BOUNDS, METHODS, OURS, ROUTERS, TASK_TUNED
from selfroute.compare.place import Place
from selfroute.compare.routing import Clock, fit_routers, make_router, route_test, threshold_for, undecided
from selfroute.compare.rows import (
    VERSION,
    Record,
    check_names,
    methods_of,
    ordering,
    read_row,
    row_info,
    write_row,
)
from selfroute.config import Choice
from selfroute.device.hf import HFEngine
from selfroute.device.load import model_path
from selfroute.errors import DivergenceError, RunError
from selfroute.evaluate.run import Outcome, calibration_responses, evaluate, judge, solve_shares
from selfroute.evaluate.summary import training
from selfroute.evaluate.validation import validation
from selfroute.protocol import cloud_request
from selfroute.records import check_problems, checkpoints, lock_run, read_json, read_records, write_json
from selfroute.tasks import Task, make_task
from selfroute.tasks.provenance import pinned, provenance
from selfroute.train.config import TrainConfig
from selfroute.train.loop import train
from selfroute.types import Progress


def compare(
    config: CompareConfig, out: Path, *, jobs: int = 1, progress: Progress = lambda what, done, total: None
) -> None:
    """Run what is missing of a comparison into OUT/TESTBED, in `jobs` processes that share the cores.

    Raises:
        RunError: the folder holds rows that were made with other settings.
        CloudError, TrainingError, KeyboardInterrupt: as from training; what is finished stays.
    """
    testbed = out / config.testbed
    with lock_run(testbed):
        place = Place(config, testbed)

        def placed(what: str, done: int, total: int) -> None:
            progress(f"{place} | {what}", done, total)

        matrix = Matrix(config, testbed, placed)
        if jobs == 1:
            matrix.run()
            return
        missing = []
        for part in config.parts():
            if Place(part, testbed).left:
                missing.append({"config": part.stored(), "testbed": str(testbed.resolve())})
            else:
                # Checked, and not worth a process.
                Matrix(part, testbed, placed).run()
        if missing:
            # The same however many parts are left, since their number changes how sums are rounded.
            threads = max(1, torch.get_num_threads() // jobs)
            run_parts(missing, jobs=min(jobs, len(missing)), threads=threads, progress=placed)


class Matrix:
    """The rows of one testbed, or of a part of its methods."""

    def __init__(self, config: CompareConfig, testbed: Path, progress: Progress) -> None:
        self.config, self.testbed, self._progress = config, testbed, progress
        file = testbed / "testbed.json"
        before: dict[str, Any] = read_json(file) if file.is_file() else {}
        self.task: Task = make_task(pinned(config.train.task, before.get("data", {})))
        self._check_early()
        self._check_settings(before)
        # Since the last row was written, or the start: what a row took, the search for its learning rate too.
        self._begun = time.perf_counter()

    def _check_early(self) -> None:
        """What would fail only after hours of training fails now."""
        threshold_for([0.0] * len(self.task.load("calibration")), self.config.train.budget)
        check_questions(self.config.train.cloud, [*self.task.load("train"), *self.task.load("test")])
        if self.config.encoder:
            make_router("router_encoder", HFEngine.load(self.config.train.device), self.task, self.config, 0)

    def _check_settings(self, before: Mapping[str, Any]) -> None:
        """What every row shares must be what the rows that are there were made with."""
        shared = {
            **self.config.shared(),
            "rows_version": VERSION,
            "device_sha256": weights(model_path(self.config.train.device.model)),
        }
        data = provenance(self.task, "train", "calibration", "test")
        # Trainings read at the hub what the comparison was begun with, whatever comes later.
        self._data = before.get("data") or data
        if before and (methods_of(self.testbed) or (self.testbed / "search").exists()):
            if changed := self.config.differing(shared, before):
                raise RunError(
                    f"the rows in {self.testbed} were made with other settings ({', '.join(changed)}): give another "
                    "--out, or remove it"
                )
            check_problems(self.testbed, self._data, data, "give another --out")
            if "data" not in before:
                check_names(self.testbed, [p.id for p in self.task.load("test")])
        write_json(self.testbed / "testbed.json", {**shared, "data": self._data})

    def progress(self, method: str, seed: int) -> Progress:
        """Progress of a row."""
        return lambda what, n, total: self._progress(f"{method}, seed {seed}: {what}", n, total)

    def run(self) -> None:
        with open_judge(self.task, self.testbed / "judge.sqlite", phase="evaluate"):
            self._run()

    def _run(self) -> None:
        for seed in self.config.seeds:
            bounds = [m for m in self.config.methods if m in BOUNDS and row_info(self.testbed, m, seed) is None]
            if bounds:
                self._bounds(bounds, seed)
            for method in self.config.trained:
                self._trained(method, seed)
                self._swap(method, seed)
            check_bases(self.testbed, seed)
            missing = [m for m in self.config.methods if m in ROUTERS and row_info(self.testbed, m, seed) is None]
            for base in dict.fromkeys(METHODS[m].on for m in missing):
                assert base is not None
                self._routers([m for m in missing if METHODS[m].on == base], base, seed)

    # The two sides alone.

    def _bounds(self, methods: Sequence[str], seed: int) -> None:
        config = self.config.train.model_copy(update={"seed": seed})
        progress = self.progress(" and ".join(methods), seed)
        outcomes = self._evaluate(config, HFEngine.load(config.device), self.testbed / "cloud.sqlite", progress)
        for method in methods:
            asks = method == "cloud_only"
            records = [_record(o, score=None, asked=asks, undecided=False) for o in outcomes]
            self._write(method, seed, {"config": config.model_dump(mode="json")}, records)

    def _write(
        self,
        method: str,
        seed: int,
        info: Mapping[str, Any],
        records: Sequence[Record],
        metrics: Sequence[dict[str, Any]] = (),
    ) -> None:
        seconds, self._begun = time.perf_counter() - self._begun, time.perf_counter()
        made = {"seconds": round(seconds, 1), "threads": torch.get_num_threads()}
        write_row(self.testbed, method, seed, {**info, **made}, records, metrics)

    def _evaluate(
        self, config: TrainConfig, engine: HFEngine, memory: Path, progress: Progress, *, forbid: bool = True
    ) -> list[Outcome]:
        """The test problems; `forbid`: with help forbidden."""
        sampling = config.evaluation.model_copy(update={"forbid_help": True}) if forbid else config.evaluation
        with Cloud(make_cloud(config.cloud), memory) as cloud:
            return evaluate(engine, self.task, cloud, sampling=sampling, seed=config.seed, progress=progress)

    # Trained methods.

    def _trained(self, method: str, seed: int) -> None:
        done = row_info(self.testbed, method, seed)
        if done is not None:
            check_trained(self.config, self.testbed / "rows" / method, method, done["config"])
            return
        progress = self.progress(method, seed)
        config = self.config.training(method, lr=self._choose_lr(method, progress), seed=seed)
        if self._same(method, config):
            return
        run = self._train(method, config, progress)
        engine = _load(run, config)
        info: dict[str, Any] = {
            "config": config.model_dump(mode="json"),
            "ledger": training(run),
            "weights_sha256": weights(checkpoints(run)[-1]),
        }
        forbid = method == TASK_TUNED
        if not forbid:
            info |= self._calibrate(config, engine, progress)
        outcomes = self._evaluate(config, engine, run / "cloud.sqlite", progress, forbid=forbid)
        shares: dict[str, float] = {}
        if not forbid:
            threshold = info["calibration"]["threshold"]
            problems = {p.id: p for p in self.task.load("test")}
            asked = [
                problems[o.problem]
                for o in outcomes
                if o.route == "cloud" or ordering(o.problem, o.score, o.route == "undecided") > threshold
            ]
            samples = self.config.num_samples - 1
            stream = f"{config.seed}/test"
            shares = solve_shares(engine, self.task, asked, config.evaluation, stream, samples, progress)
        records = [
            _record(
                o,
                score=None if forbid else o.score,
                asked=o.route == "cloud",
                undecided=not forbid and o.route == "undecided",
                share=shares.get(o.problem),
            )
            for o in outcomes
        ]
        self._write(method, seed, info, records, read_records(run / "metrics.jsonl"))

    def _same(self, method: str, config: TrainConfig) -> bool:
        """Whether ours or another ablation was trained with these very settings; its row serves for this one too."""
        for other in (OURS, *self.config.ablations) if method in self.config.ablations else ():
            done = row_info(self.testbed, other, config.seed)
            trained = done["config"] if done else None
            if trained and trained["lr"] == config.lr and not self.config.changed(method, trained):
                row = read_row(self.testbed, other, config.seed)
                info = {**_own(row.info), "same_as": other}
                self._write(method, config.seed, info, row.records, row.metrics)
                return True
        return False

    def _swap(self, method: str, seed: int) -> None:
        """An ablation of the cloud: the same responses, with the answers of other clouds."""
        missing = [c for c in self.config.swap_clouds if self._unswapped(f"{method}@{brief(c)}", c, seed)]
        if not missing or "cloud" not in self.config.ablations.get(method, {}):
            return
        row, problems = read_row(self.testbed, method, seed), self.task.load("test")
        for choice in missing:
            with Cloud(make_cloud(choice), self.testbed / "cloud.sqlite") as cloud:
                answers = cloud.ask([(p.id, cloud_request(p.question)) for p in problems], phase="evaluate")
            records = [
                replace(
                    record,
                    cloud_correct=read.verdict.correct,
                    cloud_grade=read.verdict.grade,
                    cloud_tokens=answer.completion_tokens,
                    cloud_cost_usd=answer.cost_usd,
                )
                for record, answer, read in zip(row.records, answers, judge(self.task, problems, answers), strict=True)
            ]
            info = {**_own(row.info), "swapped_cloud": choice.model_dump(mode="json")}
            self._write(f"{method}@{brief(choice)}", seed, info, records)

    def _unswapped(self, name: str, choice: Choice, seed: int) -> bool:
        """Whether a row is still to be made; one of another cloud under the same name is refused."""
        done = row_info(self.testbed, name, seed)
        if done is not None and done["swapped_cloud"] != choice.model_dump(mode="json"):
            raise RunError(f"{self.testbed / 'rows' / name} is of another cloud: give another --out, or remove it")
        return done is None

    def _train(self, method: str, config: TrainConfig, progress: Progress) -> Path:
        run = self.testbed / "runs" / method / f"lr-{config.lr:g}-seed-{config.seed}"
        config = config.model_copy(update={"task": pinned(config.task, self._data)})
        train(config, run, resume=True, report=lambda step: progress("training", step.step, config.steps))
        return run

    def _choose_lr(self, method: str, progress: Progress) -> float:
        """The learning rate of a method: the best on the calibration problems, trained in full with the first seed."""
        lrs = self.config.lrs
        if len(lrs) == 1 or "lr" in self.config.ablations.get(method, {}):
            return lrs[0]
        file = self.testbed / "search" / f"{method}.json"
        known: dict[str, Any] = read_json(file) if file.is_file() else {"tried": {}}
        for tried in known["tried"].values():
            check_tried(self.config, file, method, tried)
        for lr in lrs:
            if f"{lr:g}" in known["tried"]:
                continue
            config = self.config.training(method, lr=lr, seed=self.config.seeds[0])
            try:
                run = self._train(method, config, progress)
                found = {**self._validate(method, config, run, progress), "ledger": training(run)}
            except DivergenceError as error:
                # A rate at which the training diverges is one that the search rules out.
                found = {"validation": None, "error": str(error), "ledger": None}
            known["tried"][f"{lr:g}"] = {**found, "config": config.model_dump(mode="json")}
            write_json(file, known)
        values = {lr: known["tried"][f"{lr:g}"]["validation"] for lr in lrs}
        usable = {lr: value for lr, value in values.items() if value is not None}
        if not usable:
            raise DivergenceError(f"{method} diverges at every learning rate: see {file}")
        best = max(usable, key=lambda lr: usable[lr])
        if known.get("chosen") != best:
            write_json(file, {**known, "chosen": best})
        return best

    def _validate(self, method: str, config: TrainConfig, run: Path, progress: Progress) -> dict[str, Any]:
        """Accuracy on the calibration problems: of the device alone for the task-tuned model, else at the budget; and
        what that took."""
        clock = Clock()
        with Cloud(make_cloud(config.cloud), run / "cloud.sqlite") as cloud:
            value = validation(
                _load(run, config),
                self.task,
                cloud,
                sampling=config.evaluation,
                seed=config.seed,
                budget=self.config.train.budget,
                alone=method == TASK_TUNED,
                progress=progress,
            )
        asked = spent_by_phase(run / "cloud.sqlite").get("evaluate")
        calls = (
            {"cloud_calls": asked.calls, "cost_usd": asked.cost_usd} if asked else {"cloud_calls": 0, "cost_usd": 0.0}
        )
        return {"validation": value, "validated": {**calls, **clock.lap().json()}}

    def _calibrate(self, config: TrainConfig, engine: HFEngine, progress: Progress) -> dict[str, Any]:
        """The dial's threshold on l for the budget, from one response to each calibration problem; no cloud."""
        clock = Clock()
        sampling = config.evaluation
        found = calibration_responses(
            engine, self.task, sampling=sampling, seed=config.seed, draws=1, progress=progress
        )
        scores = [ordering(problem, r.score, undecided(r)) for problem, r in found]
        return {
            "calibration": threshold_for(scores, self.config.train.budget),
            "fit": {"device_tokens": sum(len(r.token_ids) for _, r in found), **clock.lap().json()},
        }

    # Routers on a trained model.

    def _routers(self, missing: Sequence[str], base: str, seed: int) -> None:
        progress = self.progress(f"routers on {base}", seed)
        trained = row_info(self.testbed, base, seed)
        assert trained is not None
        config = self.config.training(base, lr=trained["config"]["lr"], seed=seed)
        run = self._train(base, config, progress)
        check_weights(self.testbed, base, seed, checkpoints(run)[-1])
        engine = _load(run, config)
        fitted = fit_routers(missing, engine, self.task, self.config, seed, progress)
        with Cloud(make_cloud(config.cloud), run / "cloud.sqlite") as cloud:
            routed, answers = route_test(fitted, engine, self.task, cloud, self.config, seed, progress)
        if base == TASK_TUNED:
            check_answers(self.testbed, seed, answers)
        for router in fitted:
            info = {"config": config.model_dump(mode="json"), "ledger": training(run), **router.info}
            self._write(router.method, seed, info, routed[router.method])


def _load(run: Path, config: TrainConfig) -> HFEngine:
    return HFEngine.load(config.device.model_copy(update={"model": str(checkpoints(run)[-1])}))


def _record(
    o: Outcome, *, score: float | None, asked: bool | None, undecided: bool, share: float | None = None
) -> Record:
    return Record(
        problem=o.problem,
        score=score,
        undecided=undecided,
        asked=asked,
        response=o.response,
        answer=o.device_answer,
        device_correct=o.device_correct,
        device_tokens=o.device_tokens,
        cloud_correct=o.cloud_correct,
        cloud_tokens=o.cloud_tokens,
        cloud_cost_usd=o.cloud_cost_usd,
        solve_share=share,
        device_grade=o.device_grade,
        cloud_grade=o.cloud_grade,
    )


def _own(info: dict[str, Any]) -> dict[str, Any]:
    """What a row says of itself, without what names it."""
    return {
        k: v for k, v in info.items() if k not in ("schema", "method", "seed", "git", "versions", "seconds", "threads")
    }
