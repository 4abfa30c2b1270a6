"""The same rollouts through TRL's trainer and through our loop: the same gradient."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.train.test_loop import plans_of, trainer

from selfroute.config import load, validate
from selfroute.errors import ConfigError
from selfroute.protocol import chat
from selfroute.train.config import TrainConfig, whole
from selfroute.train.plan import batch
from selfroute.train.trl import TRLConfig, grpo_config, main

ROOT = Path(__file__).parents[3]
SETTINGS: dict[str, Any] = {
    "steps": 1, "problems_per_step": 6, "num_responses": 4, "max_grad_norm": 1e9,
    "device": {"model": "countdown-1m", "dtype": "float32"},
    # Some responses are cut, so that their decisions are learned from too.
    "sampling": {"max_tokens": 80},
}  # fmt: skip


def run(*command: str, processes: int) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, *command],
        capture_output=True, text=True, timeout=400, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


EARLY = {
    "sampling": {"max_tokens": 80, "early_exit": True},
    "reward": {"answer": 1.0, "cloud": 0.25, "format": 0.02, "token_cost": 0.002},
}


@pytest.mark.parametrize(
    ("processes", "weight", "more"),
    [
        pytest.param(1, 0.0, {}, marks=pytest.mark.slow),
        (1, 3.0, {}),
        pytest.param(2, 0.0, {}, marks=pytest.mark.slow),
        (2, 3.0, {}),
        pytest.param(1, 3.0, EARLY, marks=pytest.mark.slow),
        pytest.param(2, 3.0, EARLY, marks=pytest.mark.slow),
    ],
)
def test_the_gradient_is_that_of_our_loop(tmp_path: Path, processes: int, weight: float, more: dict[str, Any]) -> None:
    changes = {**SETTINGS, "decision_weight": weight, **more}
    with trainer(tmp_path / "ours", **changes) as made:
        plans = plans_of(made)
        record = made.step(1)
        ours = {n: p.grad for n, p in made.engine.model.named_parameters() if p.grad is not None}
        config = made.config.model_dump(mode="json")
    [plan] = plans
    assert 0 < len(plan.selection.kept) < 6
    assert record.undecided > 0
    recorded = {
        chat(p.question)[-1]["content"]: [list(r.token_ids) for r in one.responses]
        for p, one in zip(batch(made.config, made.problems, 1), plan.judged, strict=True)
    }
    config["trl"] = {"per_device_train_batch_size": 3, "disable_tqdm": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "rollouts.json").write_text(json.dumps(recorded))
    arguments = ["config.json", "rollouts.json", "theirs", "gradient.safetensors"]
    run("-m", "tests.trl_replay", *(str(tmp_path / a) for a in arguments), processes=processes)
    theirs = load_file(tmp_path / "gradient.safetensors")
    assert {n.removeprefix("module.") for n in theirs} == set(ours)
    for name, gradient in theirs.items():
        expected = ours[name.removeprefix("module.")]
        assert torch.allclose(gradient, expected, rtol=0, atol=1e-5 * float(expected.abs().max()) + 1e-8), name


SMALL = [
    "countdown-tiny", "steps=3", "problems_per_step=4", "num_responses=4", "checkpoint_every=2", "task.train=40",
    "sampling.max_tokens=60", "trl.disable_tqdm=true",
]  # fmt: skip


@pytest.mark.slow
def test_it_trains_by_the_same_config_and_resumes(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    run("-m", "selfroute.train.trl", *SMALL, *out, processes=1)
    tuned = load_file(tmp_path / "run/checkpoints/step-000003/model.safetensors")
    base = load_file(ROOT / "src/selfroute/models/countdown-1m/model.safetensors")
    assert any(not torch.equal(tuned[name], base[name].float()) for name in tuned)
    with sqlite3.connect(tmp_path / "run/cloud.sqlite") as db:
        [(calls, problems)] = db.execute("SELECT COUNT(*), COUNT(DISTINCT problem) FROM calls").fetchall()
    remembered = json.loads((tmp_path / "run/checkpoint-3/planner.json").read_text())
    assert 0 < calls == problems == len(remembered["cloud_scores"])
    shutil.rmtree(tmp_path / "run/checkpoint-3")
    run("-m", "selfroute.train.trl", *SMALL, *out, "--resume", processes=1)
    again = json.loads((tmp_path / "run/checkpoint-3/planner.json").read_text())
    before = json.loads((tmp_path / "run/checkpoint-2/planner.json").read_text())
    assert before["cloud_scores"].items() <= again["cloud_scores"].items()
    state = json.loads((tmp_path / "run/checkpoint-3/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]
    # What selfroute trained it can evaluate, whoever's loop it was.
    assert "own decision" in run("-m", "selfroute", "evaluate", str(tmp_path / "run"), processes=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"forbid_help": True}}, "cannot forbid help"),
        ({"trl": {"per_device_train_batch_size": 5}}, "do not divide into batches of 5 on 1 processes"),
        ({"trl": {"beta": 0.1, "use_vllm": True}}, "fix trl.beta"),
        ({"trl": {"warmup_steps": 7, "entropy_coef": 0.1}}, "fix trl.entropy_coef, trl.warmup_steps"),
        ({"trl": {"use_adaptive_entropy": True}}, "fix trl.use_adaptive_entropy"),
        ({"trl": {"vllm_structured_outputs_regex": "<answer>.*"}}, "fix trl.vllm_structured_outputs_regex"),
        ({"trl": {"neftune_noise_alpha": 5.0, "fp16": True}}, "fix trl.fp16, trl.neftune_noise_alpha"),
        ({"trl": {"adam_epsilon": 1e-3, "label_smoothing_factor": 0.1}}, "fix trl.adam_epsilon, trl.label_smoothing_f"),
        ({"trl": {"sync_ref_model": True, "ignore_data_skip": True}}, "fix trl.ignore_data_skip, trl.sync_ref_model"),
        ({"trl": {"remove_unused_columns": True}}, "fix trl.remove_unused_columns"),
        ({"trl": {"steps_per_generation": 2}}, "fix trl.steps_per_generation"),
        ({"trl": {"optim": "adafactor"}}, "the optimizer is AdamW, .* got 'adafactor'"),
        ({"trl": {"cache_implementation": "quantized"}}, "samples from other probabilities"),
        (
            {"trl": {"use_vlm": True}},
            r"trl\.use_vlm: TRL's GRPOConfig has no such setting; did you mean trl\.use_vllm\?",
        ),
        ({"trl": {"zzz": True}}, r"has no such setting$"),
        ({"trl": {"per_device_train_batch_size": 0}}, "a number of rows, 1 or more; got 0"),
        ({"trl": {"per_device_train_batch_size": 2.5}}, "a number of rows, 1 or more; got 2.5"),
        ({"trl": {"save_strategy": "nonsense"}}, "TRL does not take these settings .*nonsense"),
    ],
)
def test_what_the_method_does_not_allow_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = validate(TRLConfig, changes, "test")
    with pytest.raises(ConfigError, match=message):
        grpo_config(config, tmp_path, 1)


def test_the_config_for_two_machines_is_one_that_trl_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["countdown-qwen2.5-3b-2x8", "--out", str(tmp_path / "run"), "--dry-run"])
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["trl"]["use_vllm"] is True
    one_gpu = whole(load(TrainConfig, "countdown-qwen2.5-3b")).model_dump(mode="json")
    # They differ in how the work is laid out alone.
    assert {k for k in resolved if resolved[k] != one_gpu.get(k)} == {"trl", "micro_batch_tokens"}
    assert grpo_config(load(TRLConfig, "countdown-qwen2.5-3b-2x8"), tmp_path, 16).gradient_accumulation_steps == 2
    assert list(tmp_path.iterdir()) == []


def test_settings_that_trl_does_not_take_are_told_without_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^selfroute: trl\.use_vlm: .*did you mean trl\.use_vllm\?$"):
        main(["countdown-tiny", "trl.use_vlm=true", "--out", str(tmp_path / "run"), "--dry-run"])


def test_trls_settings_pass_through(tmp_path: Path) -> None:
    theirs = {"use_vllm": True, "per_device_train_batch_size": 16, "optim": "paged_adamw_8bit"}
    config = validate(TRLConfig, {"trl": {**theirs, "cache_implementation": "static"}, "lr": 3e-5}, "test")
    made = grpo_config(config, tmp_path, 2)
    assert (made.optim, made.cache_implementation) == ("paged_adamw_8bit", "static")
    assert (made.use_vllm, made.per_device_train_batch_size, made.learning_rate) == (True, 16, 3e-5)
    assert made.gradient_accumulation_steps == 64 * 8 // (16 * 2)
