"""What asking early saves on Countdown, what it costs in accuracy, and what the cloud is given at the hand-off.

    python benchmarks/early_exit.py --out FILE [--runs DIR] [--base-steps N] [--steps N] [--seeds N] [KEY=VALUE]...

A base is trained once (the main job's settings, smaller). Each arm goes on from it with its own price of a token,
without and with `early_exit`, for each seed, which names the order of the problems and all that is sampled. Test
problems are then decided by the model's own odds, by the more likely side (the dial at 0), and by the dial at 30 %; the
cloud is given the problem alone or the device's reasoning too. What is already in DIR is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfroute import api
from selfroute.cloud import make_cloud
from selfroute.cloud.memory import Cloud
from selfroute.device.base import Sampling
from selfroute.device.hf import HFEngine
from selfroute.evaluate.calibrate import calibrate
from selfroute.evaluate.run import Outcome, calibration_responses, evaluate, judge, read_outcomes, write_outcomes
from selfroute.evaluate.summary import describe
from selfroute.protocol import cloud_request, reasoning_of
from selfroute.records import write_json
from selfroute.tasks import make_task
from selfroute.train.config import TrainConfig

BASE = ("problems_per_step=32", "lr=4e-4", "lr_end=1.0", "keep_checkpoints=1", "task.test=500", "seed=0")
ARM = ("problems_per_step=12", "lr=4e-4", "keep_checkpoints=1", "task.test=300", "task.calibration=300",
       "sampling.forbid_help=true")  # fmt: skip
ARMS = {
    "at the end": ("sampling.early_exit=false", "reward.token_cost=0"),
    "early, 0.001": ("sampling.early_exit=true", "reward.token_cost=0.001"),
    "early, 0.003": ("sampling.early_exit=true", "reward.token_cost=0.003"),
}
"""When it may ask, and the price of a token; no help call is sampled in training, as in the comparison's own row."""
FIRST = next(iter(ARMS))
BUDGET = 0.3
DECISIONS = ("own decision", "bias 0", "budget 30 %")
SHOWN = ("accuracy", "call_rate", "local_accuracy", "device_tokens", "device_tokens_where_asked",
         "device_tokens_where_answered")  # fmt: skip


def train(runs: Path, arm: str, seed: int, given: argparse.Namespace) -> tuple[TrainConfig, Path]:
    """An arm's config and its checkpoint, trained from the base."""
    base = api.load_train_config("countdown-tiny", (*BASE, f"steps={given.base_steps}", *given.overrides))
    start = api.train(base, runs / "base", resume=True, report=told("base", 0))
    own = (*ARMS[arm], f"seed={seed}", f"steps={given.steps}", f"device.model={start.resolve()}")
    config = api.load_train_config("countdown-tiny", (*ARM, *given.overrides, *own))
    name = f"{arm.replace(', ', '-').replace(' ', '-')}-seed-{seed}"
    return config, api.train(config, runs / name, resume=True, report=told(arm, seed))


def told(arm: str, seed: int) -> Any:
    """Says how a training goes on."""

    def say(r: Any) -> None:
        print(
            f"{arm}, seed {seed}, step {r.step}: reward {r.reward:.3f} solved {r.local_accuracy:.3f} "
            f"asks {r.asking:.3f} tokens {r.device_tokens} {r.seconds['total']:.1f} s",
            flush=True,
        )

    return say


def measure(config: TrainConfig, checkpoint: Path) -> dict[str, dict[str, Any]]:
    """By decision (own, dial), the measures, the outcomes, and what each hand-off gives."""
    run = checkpoint.parents[1]
    task = make_task(config.task)
    cloud = Cloud(make_cloud(config.cloud), run / "cloud.sqlite")
    found = {}
    try:
        for name in DECISIONS:
            file = run / "evaluations" / name.replace(" ", "-") / "records.jsonl"
            if not file.is_file():
                engine = HFEngine.load(config.device.model_copy(update={"model": str(checkpoint)}))
                sampling = decided(name, config, engine, task)
                write_outcomes(file, evaluate(engine, task, cloud, sampling=sampling, seed=config.seed))
            outcomes = read_outcomes(file)
            found[name] = {
                "measures": describe(outcomes, untrained=None, rate=BUDGET),
                "handoff": handoffs(task, cloud, outcomes),
                "outcomes": outcomes,
            }
    finally:
        cloud.close()
    return found


def decided(name: str, config: TrainConfig, engine: HFEngine, task: Any) -> Sampling:
    """Sampling under a decision; the dial's bias comes from one response to each calibration problem."""
    if name == "own decision":
        return config.evaluation
    if name == "bias 0":
        return config.evaluation.model_copy(update={"decide": "threshold"})
    drawn = calibration_responses(engine, task, sampling=config.evaluation, seed=config.seed, draws=1)
    dial = calibrate([r.score for _, r in drawn], BUDGET, num_problems=len(drawn))
    return config.evaluation.model_copy(update={"decide": "threshold", "bias": dial.bias})


def handoffs(task: Any, cloud: Cloud, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Of the problems that were asked about: accuracy, prompt tokens and USD a call, by what the cloud is given."""
    problems = {p.id: p for p in task.load("test")}
    asked = [o for o in outcomes if o.route == "cloud"]
    given = {"problem": ["" for _ in asked], "reasoning": [reasoning_of(o.response) for o in asked]}
    result = {}
    for name, texts in given.items():
        requests = [(o.problem, cloud_request(o.question, text)) for o, text in zip(asked, texts, strict=True)]
        answers = cloud.ask(requests, phase="evaluate")
        right = [read.verdict.correct for read in judge(task, [problems[o.problem] for o in asked], answers)]
        result[name] = {
            "calls": len(asked),
            "accuracy": mean(right),
            "prompt_tokens": mean([a.prompt_tokens for a in answers]),
            "usd_per_1k_calls": mean([1000 * a.cost_usd for a in answers]),
        }
    return result


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return float(np.mean(values)) if values else None


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By arm and decision: means over the seeds with their range, and differences to asking at the end.

    A difference is paired by seed and problem; its 95 % interval is the bootstrap's, over problems.
    """
    rng = np.random.default_rng(0)
    table: list[dict[str, Any]] = []
    for arm in ARMS:
        for decision in DECISIONS:
            mine = [r for r in rows if r["arm"] == arm and r["decision"] == decision]
            base = [r for r in rows if r["arm"] == FIRST and r["decision"] == decision]
            entry: dict[str, Any] = {"arm": arm, "decision": decision, "seeds": len(mine)}
            for name in (*SHOWN, "routing_gain_captured", f"accuracy_at_{100 * BUDGET:g}"):
                values = [r["measures"][name]["value"] for r in mine if r["measures"][name]]
                entry[name] = {"mean": np.mean(values), "low": min(values), "high": max(values)} if values else None
            for name, value in (("accuracy", "correct"), ("device_tokens", "device_tokens")):
                gap = np.mean(
                    [[getattr(o, value) - getattr(b, value) for o, b in zip(m["outcomes"], n["outcomes"], strict=True)]
                     for m, n in zip(mine, base, strict=True)],
                    axis=0,
                )  # fmt: skip
                draws = [gap[rng.integers(0, len(gap), len(gap))].mean() for _ in range(2000)]
                low, high = np.quantile(draws, [0.025, 0.975])
                entry[f"{name}_ahead"] = {"mean": gap.mean(), "low": low, "high": high}
            table.append(entry)
    return table


def show(table: Sequence[dict[str, Any]]) -> None:
    """Print the table: means over seeds and their range; differences with their interval."""

    def cell(m: dict[str, float] | None, scale: float) -> str:
        return "-" if m is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(scale * m[k] for k in ("mean", "low", "high")))

    names = (*SHOWN, "accuracy_ahead", "device_tokens_ahead")
    print("| arm | decision | " + " | ".join(n.replace("_", " ") for n in names) + " |")
    print("|" + "---|" * (len(names) + 2))
    for row in table:
        cells = [cell(row[n], 1 if "tokens" in n else 100) for n in names]
        print(f"| {row['arm']} | {row['decision']} | " + " | ".join(cells) + " |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--runs", type=Path, default=Path("runs/early-exit"), help="where the run directories go")
    parser.add_argument("--base-steps", type=int, default=30)
    parser.add_argument("--steps", type=int, default=12, help="of an arm, after its base")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the config, such as task.test=50")
    given = parser.parse_args(arguments)
    rows = []
    for seed in range(given.seeds):
        for arm in ARMS:
            config, checkpoint = train(given.runs, arm, seed, given)
            for decision, found in measure(config, checkpoint).items():
                rows.append({"arm": arm, "seed": seed, "decision": decision, **found})
        # Whole after each seed, for a run that is cut.
        table = compared(rows)
        kept = [{k: v for k, v in row.items() if k != "outcomes"} for row in rows]
        write_json(
            given.out,
            {"base_steps": given.base_steps, "steps": given.steps, "base": BASE, "arm": ARM,
             "overrides": given.overrides, "arms": ARMS, "table": table,
             "rows": kept},
        )  # fmt: skip
        show(table)


if __name__ == "__main__":
    main()
