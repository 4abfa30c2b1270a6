from __future__ import annotations

import math
import shutil
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from selfroute.config import validate
from selfroute.errors import (
    CloudError,
    ConfigError,
    ContextError,
    DeviceError,
    DivergenceError,
    ReproducibilityWarning,
    RunError,
    TrainingError,
    TrainingWarning,
)
from selfroute.protocol import HELP_CALL, chat, find_decision, last_boundary
from selfroute.records import checkpoints, read_json, read_records, write_json
from selfroute.train.algorithms import ALGORITHMS
from selfroute.train.config import TrainConfig
from selfroute.train.gapg import Selection
from selfroute.train.loop import Trainer, train
from selfroute.train.plan import Judged, Plan, batch
from selfroute.train.progress import StepRecord
from selfroute.train.ranks import Ranks
from selfroute.types import Answer, HelpCall, Response, Undecided

SMALL = {
    "task": {"name": "countdown", "train": 60, "calibration": 5, "test": 5},
    "steps": 3,
    "problems_per_step": 6,
    "num_responses": 4,
    "checkpoint_every": 2,
    "sampling": {"max_tokens": 120},
}


def config(**changes: Any) -> TrainConfig:
    return validate(TrainConfig, {**SMALL, **changes}, "test")


def metrics(run: Path) -> list[dict[str, Any]]:
    """The steps of a run without their timings."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_records(run / "metrics.jsonl")]


@contextmanager
def trainer(run: Path, **changes: Any) -> Iterator[Trainer]:
    made = Trainer(config(**changes), run, Ranks())
    try:
        yield made
    finally:
        made.clouds.close()


def plans_of(made: Trainer) -> list[Plan]:
    """The plans that a trainer makes from now on."""
    seen: list[Plan] = []
    rows = made.planner.rows
    made.planner.rows = lambda plan: seen.append(plan) or rows(plan)  # type: ignore[method-assign, func-returns-value]
    return seen


class RowCounter:
    """Counts the rows that enter a forward pass of a step's update (those with a gradient), prompts apart."""

    def __init__(self, made: Trainer) -> None:
        self.rows = self.prompts = 0
        made.engine.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            count = len(kwargs["input_ids"])
            if kwargs.get("output_hidden_states"):
                self.rows += count
            else:
                # What all prompts begin with is a single row, before them.
                self.prompts = max(self.prompts, count)


def test_it_trains_and_writes_what_it_says(run_dir: Path) -> None:
    seen: list[StepRecord] = []
    last = train(config(), run_dir, report=seen.append)
    assert last == run_dir / "checkpoints" / "step-000003"
    assert [p.name for p in checkpoints(run_dir)] == ["step-000002", "step-000003"]
    records = read_records(run_dir / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3]
    for r in records:
        assert r["local_accuracy"] + r["help"] + r["wrong"] + r["undecided"] == pytest.approx(1)
        assert r["d1"] + r["d2"] <= 6
        assert r["d2"] <= 3 / 7 * r["d1"]
        assert set(r["seconds"]) == {"sample", "cloud", "update", "total", "cpu"}
    before = load_file(Path(__file__).parents[3] / "src/selfroute/models/countdown-1m/model.safetensors")
    after = load_file(last / "model.safetensors")
    assert any(not torch.equal(before[k].float(), after[k]) for k in before)


def test_a_run_is_the_same_twice_and_differs_by_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config(seed=seed), tmp_path / name)
    weights = {n: load_file(tmp_path / n / "checkpoints/step-000003/model.safetensors") for n in "abc"}
    assert all(torch.equal(weights["a"][k], weights["b"][k]) for k in weights["a"])
    assert not all(torch.equal(weights["a"][k], weights["c"][k]) for k in weights["a"])
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_only_kept_rows_enter_the_forward_pass(run_dir: Path, weight: float) -> None:
    # Pairs often earn the same: such groups have no policy gradient.
    with trainer(run_dir, decision_weight=weight, problems_per_step=24, num_responses=2) as made:
        counter = RowCounter(made)
        plans = plans_of(made)
        record = made.step(1)
    [plan] = plans
    kept, rewards = plan.selection.kept, plan.rewards_PG
    expected = owners = 0
    for p in kept:
        mean = rewards[p].mean().item()
        equal = bool((rewards[p] == rewards[p, 0]).all())
        mine = 0
        for response, decision, value in zip(
            plan.judged[p].responses, plan.judged[p].decisions, rewards[p].tolist(), strict=True
        ):
            policy = not equal and value != mean
            learns = weight > 0 and (isinstance(decision, Answer) or not response.finished)
            # A cut response's decision is a row of its own: it ends elsewhere than its tokens.
            entered = policy + learns if isinstance(decision, Undecided) else policy or learns
            expected += entered
            mine += entered
        owners += mine > 0
    assert 0 < len(kept) < 24, "the batch must have something to leave out"
    assert counter.prompts == owners
    assert counter.rows == expected == record.rows
    # What is left out was sampled all the same.
    assert record.device_tokens == sum(len(r.token_ids) for one in plan.judged for r in one.responses)
    if weight == 0:
        # Groups without a policy gradient cost nothing at all, not even their prompt.
        assert owners < len(kept)


def test_the_two_weights_keep_different_rows(tmp_path: Path) -> None:
    rows = []
    for weight in (0.0, 1.0):
        with trainer(tmp_path / str(weight), decision_weight=weight, problems_per_step=24, num_responses=2) as made:
            rows.append(made.step(1).rows)
    assert rows[0] < rows[1]


def test_an_empty_selection_changes_nothing(run_dir: Path) -> None:
    # A limit of 3 tokens cuts every response: nothing is solved, D1 and so D2 are empty.
    with trainer(run_dir, sampling={"max_tokens": 3}) as made:
        before = {k: v.clone() for k, v in made.engine.model.state_dict().items()}
        record = made.step(1)
        assert (record.d1, record.d2, record.rows, record.undecided) == (0, 0, 0, 1.0)
        assert all(torch.equal(before[k], v) for k, v in made.engine.model.state_dict().items())
        assert not made.optimizer.state


def test_the_cloud_is_asked_only_where_it_is_needed(run_dir: Path) -> None:
    with trainer(run_dir, problems_per_step=12) as made:
        plans = plans_of(made)
        record = made.step(1)
        [plan] = plans
        asked = [c is not None for c in plan.cloud_score_P]
        for one, was_asked, values in zip(plan.judged, asked, plan.rewards_PG, strict=True):
            solved = bool((values >= 1).any())
            assert was_asked == (not solved or any(isinstance(d, HelpCall) for d in one.decisions))
        assert record.cloud_calls == sum(asked) == made.cloud.spent("train").calls
        assert 0 < sum(asked) < 12
        # The oracle's answers are stated to be of 500 tokens; the prompts come to it.
        with sqlite3.connect(run_dir / "cloud.sqlite") as db:
            [(prompts, answers)] = db.execute("SELECT SUM(prompt_tokens), SUM(completion_tokens) FROM calls").fetchall()
        assert answers == 500 * sum(asked)
        assert record.cloud_tokens == prompts + answers > answers
    with trainer(run_dir.with_name("call"), problems_per_step=12, decision_cloud="call") as made:
        assert made.step(1).cloud_calls == 12


@pytest.mark.parametrize("algorithm", ["rloo", "dr_grpo", "grpo", "da_grpo", "lagrangian_gapg"])
def test_without_the_filter_every_problem_counts_and_failures_need_no_cloud(run_dir: Path, algorithm: str) -> None:
    with trainer(run_dir, algorithm=algorithm, decision_weight=0.0, problems_per_step=12) as made:
        made.planner.dual = 0.5
        plans = plans_of(made)
        record = made.step(1)
    [plan] = plans
    assert plan.selection.kept == tuple(range(12))
    asks = torch.tensor([[isinstance(d, HelpCall) for d in one.decisions] for one in plan.judged], dtype=torch.float64)
    assert [c is not None for c in plan.cloud_score_P] == asks.any(1).tolist()
    assert torch.equal(plan.advantages_PG, ALGORITHMS[algorithm].advantages(plan.rewards_PG, asks, 0.5))
    assert record.rows == int((plan.advantages_PG != 0).sum())
    assert record.dual == 0.5
    moves = algorithm in ("da_grpo", "lagrangian_gapg")
    assert made.planner.dual == pytest.approx(0.5 + 0.2 * (record.help - 0.3) if moves else 0.5)


def test_accuracy_alone_never_asks_the_cloud(run_dir: Path) -> None:
    alone = {"answer": 1.0, "cloud": 0.0, "format": 0.0}
    with trainer(run_dir, algorithm="rloo", decision_weight=0.0, reward=alone, problems_per_step=12) as made:
        record = made.step(1)
        assert record.help > 0
        assert record.reward == pytest.approx(record.local_accuracy)
        assert record.cloud_calls == made.cloud.spent().calls == 0


def test_lambda_survives_a_resume(tmp_path: Path) -> None:
    # No problem may go to the cloud, so lambda grows with every help call.
    settings = {"algorithm": "da_grpo", "decision_weight": 0.0, "budget": 0.0}
    train(config(**settings, steps=4), tmp_path / "whole")
    train(config(**settings, steps=4), tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step-000004")
    train(config(**settings, steps=4), tmp_path / "parts", resume=True)
    duals = [r["dual"] for r in read_records(tmp_path / "whole/metrics.jsonl")]
    assert duals[0] == 0 < duals[1] <= duals[2]
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    shape = {"hidden_size": 2**15, "intermediate_size": 2**17, "num_hidden_layers": 200, "num_attention_heads": 64}
    AutoConfig.for_model("llama", **shape).save_pretrained(tmp_path / "huge")
    with pytest.raises(DeviceError, match=r"not enough memory: .* take \d+\.\d GB of \d+\.\d GB that are free"):
        train(config(device={"model": str(tmp_path / "huge")}), tmp_path / "run")


def test_at_most_one_call_a_problem_over_many_passes(run_dir: Path) -> None:
    train(config(steps=8, task={"name": "countdown", "train": 12, "calibration": 1, "test": 1}), run_dir)
    [last] = read_records(run_dir / "metrics.jsonl")[-1:]
    assert last["cloud_calls"] <= 12


def test_every_pass_sees_each_problem_once(run_dir: Path) -> None:
    with trainer(run_dir) as made:
        first = [p.id for step in range(1, 11) for p in batch(made.config, made.problems, step)]
        second = [p.id for step in range(11, 21) for p in batch(made.config, made.problems, step)]
    assert sorted(first) == sorted(second) == sorted(p.id for p in made.problems)
    assert first != second


def asking(made: Trainer, before: Sequence[int]) -> torch.Tensor:
    """log P of the help call behind some tokens."""
    point = made.engine.points[0]
    path = torch.tensor([*point.prefix, point.help])
    log_prob = made.engine.model(torch.tensor([[*before, *path.tolist()]])).logits[0].log_softmax(-1)
    return log_prob[-1 - len(path) : -1].gather(1, path[:, None]).sum()


def written_out(made: Trainer, plan: Plan, prompt: list[int], p: int, g: int) -> torch.Tensor:
    """A response's part of the loss, times |D1 u D2| * G, from sequences that are run whole."""
    config, engine, rewards = made.config, made.engine, plan.rewards_PG[p]
    response, decision = plan.judged[p].responses[g], plan.judged[p].decisions[g]
    ids, sampling = list(response.token_ids), config.sampling
    logits = engine.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    drawn = logits.clone()
    for t in range(len(ids)):
        for point in engine.points:
            if sampling.forbid_help and not sampling.early_exit and point.ends(ids[:t]):
                drawn[t, point.help] = -math.inf
    advantage = 4 / 3 * (rewards[g] - rewards.mean())
    loss = -advantage * drawn.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()

    score = plan.cloud_score_P[p]
    asked = config.reward.cloud * (made.planner.cloud_share() if score is None else score)
    earned = rewards[g].item() + config.reward.token_cost * len(ids)
    # Where it could have asked: Delta, l, how many places it stands for, log P of asking there.
    places = []
    if isinstance(decision, Answer):
        found = find_decision(ids, engine.points, engine.tokenizer)
        assert found is not None
        index, point = found
        odds = logits[index, point.help] - logits[index, point.answer]
        places.append((asked - earned, odds, 1, asking(made, [*prompt, *ids[: index - len(point.prefix)]])))
    elif not response.finished:
        log_p = asking(made, [*prompt, *ids[: last_boundary(ids, engine.tokenizer)]])
        places.append((asked, log_p - torch.log1p(-log_p.exp()), 1, log_p))
    early = plan.exits_PG[p][g] if sampling.early_exit else None
    if early is not None:
        log_p = asking(made, [*prompt, *ids[: early.place]])
        saved = len(ids) - early.place - len(engine.tokenizer.encode(HELP_CALL)) - 1
        gap = early.weight * (config.reward.token_cost * saved - max(0.0, earned - asked))
        places.append((gap, log_p - torch.log1p(-log_p.exp()), early.places, log_p))
    for gap, odds, stands_for, log_p in places:
        side = math.copysign(1, gap)
        loss = loss + config.decision_weight * abs(gap) * torch.nn.functional.softplus(-side * odds)
        if sampling.forbid_help and sampling.early_exit:
            loss = loss + advantage * stands_for * torch.log1p(-log_p.exp())
    return loss


@pytest.mark.parametrize(
    "how",
    [{}, {"forbid_help": True}, {"forbid_help": True, "early_exit": True}],
    ids=["sampled", "forbidden", "declined"],
)
def test_the_update_is_the_formula(run_dir: Path, how: dict[str, Any]) -> None:
    """The gradient of a step equals that of the loss written out in float64, one response at a time."""
    exact = {
        "device": {"model": "countdown-1m", "dtype": "float64"},
        "sampling": {"max_tokens": 80, **how},
        "reward": {"token_cost": 0.001},
    }
    with trainer(run_dir, decision_weight=2.0, max_grad_norm=1e9, **exact) as made:
        plans = plans_of(made)
        before = {k: v.clone() for k, v in made.engine.model.state_dict().items()}
        record = made.step(1)
        got = {n: p.grad.clone() for n, p in made.engine.model.named_parameters() if p.grad is not None}
        made.engine.model.load_state_dict(before)
        [plan] = plans
        engine, problems = made.engine, batch(made.config, made.problems, 1)
        # Both losses are divided by the responses of the kept problems, however many rows these come to.
        count = 4 * len(plan.selection.kept)
        assert record.rows != count
        assert record.undecided > 0
        engine.model.zero_grad()
        for p in plan.selection.kept:
            prompt = engine.encode(chat(problems[p].question))
            for g in range(4):
                (written_out(made, plan, prompt, p, g) / count).backward()
        for name, parameter in engine.model.named_parameters():
            assert parameter.grad is not None
            # The architecture's norms compute in float32, whatever the weights.
            assert (parameter.grad - got[name]).norm() <= 1e-4 * got[name].norm(), name


def test_a_cut_response_decides_at_its_last_line_break(run_dir: Path) -> None:
    with trainer(run_dir) as made:
        tokenizer = made.engine.tokenizer
        ids = tokenizer.encode("1:1+2=3,3+4=7?\n2:1+4=5,", add_special_tokens=False)
        cut = Response(tokenizer.decode(ids), tuple(ids), finished=False)
        nothing = torch.zeros(1, 2, dtype=torch.float64)
        judged = [Judged([cut, cut], [Undecided(), Undecided()], [False, False], [0.0, 0.0])]
        rows = made.planner.rows(Plan(judged, [1.0], nothing, Selection((), (0,), (0,)), nothing, 0.0))
    assert [tokenizer.decode(list(r.token_ids)) for r in rows] == ["1:1+2=3,3+4=7?\n<unknown"] * 2
    assert all(r.gap == 0.25 and r.advantage == 0 and r.decision_index == len(r.token_ids) - 1 for r in rows)
    assert [tokenizer.decode(list(r.token_ids[r.boundary :])) for r in rows] == ["<unknown"] * 2


def test_a_failing_cloud_stops_the_run_and_is_not_paid_twice(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    settings = {"steps": 4, "checkpoint_every": 10, "problems_per_step": 12}

    # Where no call fails, and how many calls the first two steps take.
    calls: list[int] = []
    flaky = {"name": "tests.clouds:FlakyOracle", "broken": str(broken)}
    train(config(cloud=flaky, **settings), tmp_path / "whole", report=lambda r: calls.append(r.cloud_calls))
    # The cloud goes down in the middle of step 3: two of its answers come, the others do not.
    assert calls[2] > calls[1] + 2
    cloud = {**flaky, "answers_first": calls[1] + 2}
    broken.touch()
    with pytest.raises(CloudError, match="connection refused"):
        train(config(cloud=cloud, **settings), tmp_path / "run")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-000002"]
    paid = ledger(tmp_path / "run")
    assert len(paid) == calls[1] + 2
    broken.unlink()
    train(config(cloud=cloud, **settings), tmp_path / "run", resume=True)
    assert ledger(tmp_path / "run")[: len(paid)] == paid
    assert sorted(ledger(tmp_path / "run")) == sorted(ledger(tmp_path / "whole"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(tmp_path / run / "checkpoints/step-000004" / name) for run in ("run", "whole"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def ledger(run: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(run / "cloud.sqlite") as db:
        return db.execute("SELECT problem, phase, step, cost_usd FROM calls ORDER BY id").fetchall()


def test_a_cut_cloud_answer_is_none(run_dir: Path) -> None:
    with trainer(run_dir, cloud={"name": "tests.clouds:CutOracle", "accuracy": 1.0}, problems_per_step=12) as made:
        made.step(1)
        assert set(made.planner.cloud_scores.values()) == {0.0}


def test_a_step_that_could_not_be_written_down_is_not_saved(run_dir: Path) -> None:
    def full(record: StepRecord) -> None:
        if record.step == 1:
            # From here on no line can be added.
            (run_dir / "metrics.jsonl").rename(run_dir / "kept")
            (run_dir / "metrics.jsonl").mkdir()

    with pytest.raises(TrainingError, match=r"cannot write .*metrics.jsonl"):
        train(config(checkpoint_every=10), run_dir, report=full)
    assert checkpoints(run_dir) == []
    (run_dir / "metrics.jsonl").rmdir()
    (run_dir / "kept").rename(run_dir / "metrics.jsonl")
    train(config(checkpoint_every=10), run_dir, resume=True)
    assert [r["step"] for r in metrics(run_dir)] == [1, 2, 3]


def test_an_update_that_broke_off_is_never_saved(run_dir: Path) -> None:
    def break_off(*_: object) -> None:
        if made.finished == 1:
            raise MemoryError("in the middle of the update")

    with trainer(run_dir, checkpoint_every=10) as made:
        made.optimizer.register_step_post_hook(break_off)
        with pytest.raises(MemoryError):
            made.run(lambda record: None)
    assert checkpoints(run_dir) == []


def test_weights_that_are_not_finite_are_never_saved(run_dir: Path) -> None:
    with trainer(run_dir, checkpoint_every=10) as made:

        def spoil(record: StepRecord) -> None:
            next(made.engine.model.parameters()).data[0, 0] = math.nan

        with pytest.raises(DivergenceError, match="at step 2: start again in another --out with a lower lr"):
            made.run(spoil)
    assert checkpoints(run_dir) == []


def test_a_cloud_failing_in_the_first_step_leaves_a_run_to_resume(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    cloud = {"name": "tests.clouds:FlakyOracle", "broken": str(broken), "answers_first": 1}
    with pytest.raises(CloudError):
        train(config(cloud=cloud), tmp_path / "run")
    broken.unlink()
    train(config(cloud=cloud), tmp_path / "run", resume=True)
    assert len(metrics(tmp_path / "run")) == 3


def test_numbers_that_are_not_finite_stop_with_the_step(run_dir: Path) -> None:
    with pytest.raises(DivergenceError, match=r"the loss is -?(inf|nan) at step 1: start again .* lower lr"):
        train(config(reward={"answer": 1e39}), run_dir)
    with trainer(run_dir.with_name("reward")) as made:
        object.__setattr__(made.config, "reward", made.config.reward.model_copy(update={"answer": math.inf}))
        with pytest.raises(TrainingError, match="a reward is not finite at step 1"):
            made.step(1)
    with trainer(run_dir.with_name("weights")) as made:
        next(made.engine.model.parameters()).data[0, 0] = math.nan
        with pytest.raises(DivergenceError, match=r"logits are not finite at step 7: .* lower lr \(now 0.0002\)"):
            made.step(7)


def test_a_damaged_checkpoint_is_named(run_dir: Path) -> None:
    train(config(steps=2), run_dir)
    [saved] = checkpoints(run_dir)
    for name in ("optimizer.safetensors", "model.safetensors"):
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(whole[:100])
        with pytest.raises((TrainingError, DeviceError), match=r"step-000002.*"):
            train(config(steps=2), run_dir, resume=True)
        (saved / name).write_bytes(whole)
    assert train(config(steps=2), run_dir, resume=True) == saved


def test_another_thread_count_is_said_where_a_run_goes_on(run_dir: Path) -> None:
    train(config(steps=2), run_dir)
    state = read_json(run_dir / "checkpoints/step-000002/state.json")
    state["made_with"]["threads"] = 64
    write_json(run_dir / "checkpoints/step-000002/state.json", state)
    # A finished run is not continued, and silent.
    train(config(steps=2), run_dir, resume=True)
    longer = config(steps=3)
    write_json(run_dir / "run.json", {"config": longer.model_dump(mode="json")})
    with pytest.warns(ReproducibilityWarning, match="not be continued bit for bit: threads 64 is now 1"):
        train(longer, run_dir, resume=True)


def test_the_learning_rate_falls_in_a_straight_line(run_dir: Path) -> None:
    with trainer(run_dir, lr=1e-4, lr_end=0.1, steps=3) as made:
        rates = []
        for step in (1, 2, 3):
            made.step(step)
            rates.append(made.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-4, 5.5e-5, 1e-5])


def test_a_long_gradient_is_cut_at_its_norm_and_0_leaves_it(tmp_path: Path) -> None:
    found = {}
    for longest in (0.0, 0.01, 1e9):
        with trainer(tmp_path / str(longest), max_grad_norm=longest) as made:
            norm = made.step(1).grad_norm
            found[longest] = norm, [w.grad.clone() for w in made.optimizer.masters if w.grad is not None]
    [(norm, whole), (same, cut), (_, unbounded)] = found.values()
    # What is reported is the norm before the cut.
    assert norm == same > 0.01
    assert torch.stack([g.norm() for g in whole]).norm().item() == pytest.approx(norm)
    assert torch.stack([g.norm() for g in cut]).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(whole, unbounded, strict=True))


def test_the_optimizer_is_adamw_of_the_settings_without_weight_decay(run_dir: Path) -> None:
    with trainer(run_dir, lr=1e-3, beta2=0.5) as made:
        weight = made.optimizer.masters[0]
        before = weight.detach().clone()
        made.step(1)
        gradient, entry = weight.grad, made.optimizer.state[weight]
    assert gradient is not None
    # A first step is lr long whatever the gradient, and nothing else moves a weight.
    assert torch.allclose(entry["exp_avg"], 0.1 * gradient)
    assert torch.allclose(entry["exp_avg_sq"], 0.5 * gradient**2)
    assert torch.allclose(weight, before - 1e-3 * gradient / (gradient.abs() + 1e-8), rtol=0, atol=1e-7)


def test_a_problem_twice_in_a_batch_gets_fresh_responses(run_dir: Path) -> None:
    with trainer(run_dir, task={"name": "countdown", "train": 4, "calibration": 1, "test": 1}) as made:
        streams = made._streams(1, batch(made.config, made.problems, 1))
    assert len({name for group in streams for name in group}) == 6 * 4


def test_the_mixed_rule_leaves_solved_problems_out(run_dir: Path) -> None:
    # Of pairs, some are both solved.
    with trainer(run_dir, d1="mixed", problems_per_step=24, num_responses=2) as made:
        strict = made.step(1)
    with trainer(run_dir.with_name("any"), problems_per_step=24, num_responses=2) as made:
        loose = made.step(1)
    assert strict.d1 < loose.d1


def test_a_missing_tracker_is_named(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="pip install wandb"):
        train(config(trackers=["wandb"]), run_dir)


def test_an_existing_run_is_not_overwritten(run_dir: Path) -> None:
    train(config(steps=1), run_dir)
    with pytest.raises(RunError, match="--resume"):
        train(config(steps=1), run_dir)
    with pytest.raises(RunError, match=r"other settings \(lr\)"):
        train(config(steps=1, lr=1e-5), run_dir, resume=True)
    # A finished run resumes to nothing.
    assert train(config(steps=1), run_dir, resume=True).name == "step-000001"


@pytest.mark.parametrize("sampling", [{"temperature": 0.5}, {"decide": "threshold"}], ids=lambda s: next(iter(s)))
def test_training_samples_from_the_model_itself(sampling: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="training samples from the model itself"):
        config(sampling=sampling)


def test_what_small_gradients_vanish_in_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"float16 is not trained.*set device\.dtype=bfloat16 or float32"):
        train(config(device={"dtype": "float16"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_sampled_help_calls_the_decision_is_learned_all_the_same(run_dir: Path) -> None:
    changes = {"sampling": {"max_tokens": 60, "forbid_help": True}, "decision_weight": 10.0}
    train(config(steps=3, **changes), run_dir)
    steps = metrics(run_dir)
    assert all(step["help"] == 0 for step in steps)
    # Cut responses are among them: their help calls were not drawn, and have no advantage.
    assert any(step["undecided"] > 0 for step in steps)
    assert all(step["decision_loss"] > 0 and math.isfinite(step["grad_norm"]) for step in steps)
    with pytest.raises(ConfigError, match="only the decision loss can teach asking"):
        config(**{**changes, "decision_weight": 0.0})
    config(**{**changes, "decision_weight": 0.0}, reward={"cloud": 0.0, "format": 0.0})


def test_a_tracker_logs_each_step(run_dir: Path) -> None:
    train(config(steps=1, trackers=["tensorboard"]), run_dir)
    assert list(run_dir.glob("selfroute/events.*"))


def test_a_model_that_never_writes_the_tags_is_told_of_once(tmp_path: Path) -> None:
    # One token is no tag.
    silent = config(steps=5, sampling={"max_tokens": 1}, evaluation={"max_tokens": 1})
    with pytest.warns(TrainingWarning, match="no response of the last 3 steps came to an answer") as caught:
        train(silent, tmp_path / "run")
    assert len([w for w in caught if w.category is TrainingWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        train(config(), tmp_path / "speaking")


def test_a_problem_that_does_not_fit_the_context_is_named_before_any_step(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match=r"problem \S+: a prompt of \d+ tokens, with up to 980 of the response"):
        train(config(sampling={"max_tokens": 980}, evaluation={"max_tokens": 980}), tmp_path / "run")
    assert not (tmp_path / "run/metrics.jsonl").exists()
