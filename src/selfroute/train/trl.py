"""GAPG inside TRL's GRPOTrainer, for many GPUs and machines: FSDP, DeepSpeed and vLLM rollouts are TRL's.

    accelerate launch -m selfroute.train.trl CONFIG [KEY=VALUE]... --out DIR

A thin adapter: what a batch teaches comes from `plan`, as in our own loop, the decision loss from `rows` and `gapg`.
TRL's loss is set to the sum of a response's log-probabilities times its advantage; advantages are ours, zero for what
the filter leaves out, so its rows still cost a pass. Left out on purpose: forbidding help in rollouts.

Axes: B rows, K last tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from selfroute.cloud import check_questions, free_settings, make_cloud
from selfroute.cloud.memory import Cloud, open_judge
from selfroute.config import load
from selfroute.device.base import DeviceConfig
from selfroute.device.hf import HFEngine, accepted
from selfroute.device.load import place
from selfroute.device.prefix import pad_left
from selfroute.errors import ConfigError, DivergenceError, RunError, SelfrouteError
from selfroute.protocol import chat
from selfroute.records import known_data, lock_run, open_run, read_json, write_json
from selfroute.tasks import make_task
from selfroute.tasks.provenance import pinned, provenance
from selfroute.train import gapg
from selfroute.train.config import TrainConfig, as_now, check_dtype, whole
from selfroute.train.plan import Plan, Planner, batch
from selfroute.train.ranks import PATIENCE, Ranks
from selfroute.train.rows import Row, log_odds, row_log_probs
from selfroute.types import Response


class TRLConfig(TrainConfig):
    """A run through TRL: the settings of `selfroute train`, and TRL's own."""

    trl: dict[str, Any] = Field({})
    """Passed to TRL's GRPOConfig as they are: `use_vllm`, `per_device_train_batch_size`, `fsdp`, `deepspeed`, ..."""


def grpo_config(config: TRLConfig, out: Path, processes: int) -> GRPOConfig:
    """TRL's settings that make its loss the unbiased policy gradient, and one generation batch one update.

    Raises:
        ConfigError: settings that TRL does not know, cannot follow or that change the method, or a batch that does not
            divide.
    """
    _check_names(config.trl)
    if config.sampling.forbid_help:
        raise ConfigError("TRL's rollouts cannot forbid help: set sampling.forbid_help=false")
    if config.evaluation.every:
        raise ConfigError("no best checkpoint is kept through TRL: set evaluation.every=0")
    if config.device.quantize:
        raise ConfigError("4-bit weights are not trained through TRL: set device.quantize to nothing")
    check_dtype(config)
    rows = config.problems_per_step * config.num_responses
    size = config.trl.get("per_device_train_batch_size", config.num_responses)
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"trl.per_device_train_batch_size: a number of rows, 1 or more; got {size!r}")
    if rows % (size * processes):
        raise ConfigError(
            f"{config.problems_per_step} problems of {config.num_responses} responses do not divide into batches of "
            f"{size} on {processes} processes (trl.per_device_train_batch_size)"
        )
    half = config.device.dtype == "bfloat16"
    ours: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": config.steps,
        "num_generations": config.num_responses,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": rows // (size * processes),
        "generation_batch_size": rows,
        "max_completion_length": config.sampling.max_tokens,
        "chat_template_kwargs": {"enable_thinking": config.device.thinking},
        # The model's own distribution.
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "mask_truncated_completions": False,
        "min_p": None,
        "repetition_penalty": 1.0,
        "generation_kwargs": None,
        "vllm_structured_outputs_regex": None,
        # -A_i times the sum of a response's log-probabilities, averaged over all rows; no KL, no second use of a batch.
        "loss_type": "luspo",
        "importance_sampling_level": "sequence",
        "scale_rewards": "none",
        "beta": 0.0,
        "num_iterations": 1,
        "delta": None,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "router_aux_loss_coef": 0.0,
        "reward_weights": None,
        "disable_dropout": True,
        "neftune_noise_alpha": None,
        "label_smoothing_factor": 0.0,
        "sync_ref_model": False,
        "vllm_importance_sampling_correction": False,
        "learning_rate": config.lr,
        "adam_beta1": 0.9,
        "adam_beta2": config.beta2,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        # A step of numbers that are not finite is an error, not one to leave out of the log.
        "logging_nan_inf_filter": False,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        # The order of the problems is ours, on a resume too, and so is the column that names them.
        "shuffle_dataset": False,
        "ignore_data_skip": False,
        "remove_unused_columns": False,
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": half,
        # Small gradients vanish in it.
        "fp16": False,
        "use_cpu": place(config.device) == "cpu",
        "logging_steps": 1,
        "save_steps": config.checkpoint_every,
        "save_total_limit": config.keep_checkpoints,
        "report_to": list(config.trackers) or "none",
    }
    schedule = {"warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "num_train_epochs", "steps_per_generation"}
    fixed = sorted(set(config.trl) & (set(ours) | schedule) - {"per_device_train_batch_size", "report_to"})
    if fixed:
        raise ConfigError(f"the method or the run's own settings fix {', '.join('trl.' + name for name in fixed)}")
    if not str(config.trl.get("optim", "adamw")).removeprefix("paged_").startswith("adamw"):
        raise ConfigError(f"trl.optim: the optimizer is AdamW, in any of TRL's forms; got {config.trl['optim']!r}")
    if config.trl.get("cache_implementation") == "quantized":
        raise ConfigError(
            "trl.cache_implementation: a quantized cache samples from other probabilities than are trained"
        )
    try:
        # Ranks wait while the first one asks a cloud that reasons.
        return GRPOConfig(**{"ddp_timeout": int(PATIENCE.total_seconds()), **ours, **config.trl})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"TRL does not take these settings (trl.KEY=VALUE): {error}") from error


def _check_names(settings: Mapping[str, Any]) -> None:
    """Whether TRL knows settings of these names.

    Raises:
        ConfigError: one that it does not know.
    """
    known = [field.name for field in fields(GRPOConfig) if field.init]
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ConfigError(
                f"trl.{name}: TRL's GRPOConfig has no such setting" + (f"; did you mean trl.{near[0]}?" if near else "")
            )


class GAPGTrainer(GRPOTrainer):
    """TRL's trainer with our plan and the decision loss.

    Args:
        config: the run's settings.
        out: the run directory.
        rollout_func: as TRL's; None samples as TRL does.
    """

    def __init__(self, config: TRLConfig, out: Path, *, rollout_func: Callable[..., Any] | None = None) -> None:
        args = grpo_config(config, out, int(os.environ.get("WORLD_SIZE", 1)))
        self.config, self.ranks = config, Ranks(place(config.device))
        self.task = make_task(config.task)
        self.problems = {p.id: p for p in self.task.load("train")}
        model, tokenizer = _model(config)
        ordered = [p for step in range(1, config.steps + 1) for p in batch(config, list(self.problems.values()), step)]
        dataset = Dataset.from_list(
            [{"prompt": accepted(tokenizer, chat(p.question)), "problem": p.id} for p in ordered]
        )
        self.plan: Plan | None = None
        self.learns = False
        self._rewards: list[float] = []

        def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
            return self._rewards

        super().__init__(
            model,
            reward,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            rollout_func=rollout_func,
        )
        self.engine = HFEngine(self.accelerator.unwrap_model(self.model), tokenizer, thinking=config.device.thinking)
        # Closed by who made this trainer.
        self.clouds, self.cloud = ExitStack(), None
        if self.ranks.first:
            self.cloud = self.clouds.enter_context(Cloud(make_cloud(config.cloud), out / "cloud.sqlite"))
            self.clouds.enter_context(open_judge(self.task, out / "judge.sqlite", phase="train"))
        self.planner = Planner(config, self.task, tokenizer, self.engine.points, self.cloud, self.ranks)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate falls in a straight line to `lr_end`, as in our loop."""
        last, end = max(1, self.config.steps - 1), self.config.lr_end
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: 1 - min(1.0, step / last) * (1 - end)
        )
        return self.lr_scheduler

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        """Plan the batch of all processes first; TRL then reads its rewards off the plan."""
        here = [(one["problem"], tuple(map(int, ids))) for one, ids in zip(inputs, completion_ids_list, strict=True)]
        everything = gather_object(here)
        G = self.config.num_responses
        groups = [everything[at : at + G] for at in range(0, len(everything), G)]
        problems = [self.problems[group[0][0]] for group in groups]

        responses = [[self._response(ids) for _, ids in group] for group in groups]
        judged = self.planner.judge(problems, responses)
        self.plan = self.planner.plan(self.state.global_step + 1, problems, judged)
        # Now, so that a checkpoint after the update holds it.
        self.planner.follow(self.plan)
        self.learns = bool(self.planner.rows(self.plan))
        begin = self.ranks.rank * len(here)
        mine = range(begin, begin + len(here))
        kept = set(self.plan.selection.kept)
        # TRL averages over all rows, kept or not.
        scale = len(everything) / self.plan.count if self.plan.count else 0.0
        self._advantages = [self.plan.advantages_PG[i // G, i % G].item() * scale * (i // G in kept) for i in mine]
        learned = (
            (self.planner.decision, self.planner.early) if self.config.sampling.early_exit else (self.planner.decision,)
        )
        self._decisions = [[of(self.plan, i // G, i % G) if i // G in kept else None for i in mine] for of in learned]
        self._rewards = [self.plan.rewards_PG[i // G, i % G].item() for i in mine]
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return rewards

    def _response(self, ids: tuple[int, ...]) -> Response:
        return Response(self.engine.decode(ids), ids, ids[-1] in self.engine.end_tokens, None, None)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        output["advantages"] = torch.tensor(self._advantages).to(output["advantages"])
        # Says after TRL's shuffle which decision is whose.
        output["row"] = torch.arange(len(self._advantages))
        return output

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = super()._compute_loss(model, inputs)
        if self.config.decision_weight > 0:
            # The decisions at the end, then those before it, a pass each.
            for learned in self._decisions:
                loss = loss + self._decision_loss(model, inputs, [learned[i] for i in inputs["row"].tolist()])
        return loss

    def _decision_loss(self, model: torch.nn.Module, inputs: dict[str, Any], decisions: Sequence[Row | None]) -> Tensor:
        """The decision loss of a micro-batch, from a pass up to each decision. Every process makes one, with sharded
        weights none may stay away."""
        assert self.plan is not None
        last = max((len(_path(row)) for row in decisions if row), default=1)
        sequences, rows = [], []
        for ids, mask, row in zip(inputs["prompt_ids"], inputs["prompt_mask"], decisions, strict=True):
            prompt = ids[mask.bool()].tolist()
            tokens = [*prompt, *row.token_ids[:-1]] if row else prompt[:1]
            # Aligned at their ends, the decision is the last of K tokens.
            sequences.append([self.engine.pad] * (last - len(tokens)) + tokens)
            rows.append(_at_the_end(row, last) if row else Row(0, [0] * last, 0.0))
        ids, mask = pad_left(sequences, self.engine.pad, inputs["prompt_ids"].device)
        logits_BKV = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            logits_to_keep=last,
        ).logits
        nothing: Tensor = logits_BKV.sum() * 0.0
        if not any(decisions):
            return nothing
        log_prob_B = row_log_probs(_same, logits_BKV, rows)
        log_odds_D = log_odds(_same, logits_BKV, rows, log_prob_B)
        gap_D = torch.tensor([row.gap for row in rows if row.point], device=logits_BKV.device)
        loss = gapg.decision_loss(log_odds_D, gap_D, self.config.decision_weight, self.plan.count)
        # Gradients are averaged over the processes.
        return loss * self.ranks.size

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise DivergenceError(f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower lr")
        if not self.learns:
            # Nothing to learn from: weights without a gradient stay as they are, momentum or not.
            self.model.zero_grad(set_to_none=True)
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.ranks.first:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            write_json(folder / "planner.json", self.planner.state())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / "planner.json"
        if not file.is_file():
            raise RunError(f"{resume_from_checkpoint} was not written whole: remove it to resume from the one before")
        self.planner.resume(read_json(file))


def _model(config: TRLConfig) -> tuple[Any, PreTrainedTokenizerBase]:
    """The device model; one for bfloat16 keeps float32 weights, and runs under autocast."""
    half = config.device.dtype == "bfloat16"
    device: DeviceConfig = config.device.model_copy(update={"device": "cpu", **({"dtype": "float32"} if half else {})})
    engine = HFEngine.load(device)
    return engine.model, engine.tokenizer


def _same(logits: Tensor) -> Tensor:
    return logits


def _path(row: Row) -> Sequence[int]:
    """The tokens at the end of a decision's row whose probabilities are read."""
    return row.token_ids[row.decision_index if row.boundary is None else row.boundary :]


def _at_the_end(row: Row, last: int) -> Row:
    """A decision's row by its `last` tokens alone."""
    path = _path(row)
    return replace(
        row,
        token_ids=[*[0] * (last - len(path)), *path],
        decision_index=last - 1,
        boundary=None if row.boundary is None else last - len(path),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train by the settings of a config; what `accelerate launch -m selfroute.train.trl` runs."""
    parser = argparse.ArgumentParser(prog="selfroute.train.trl", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "config", help="a config that comes with selfroute, or a .toml file; [trl] holds TRL's settings"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes, such as trl.use_vllm=true; [trl] is TRL's"
    )
    parser.add_argument("--out", type=Path, required=True, help="the run directory to write")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, and stop")
    given = parser.parse_args(arguments)
    try:
        config = load(TRLConfig, given.config, given.overrides)
        if given.dry_run:
            dry_run(config, given.out)
            return
        train(config, given.out, resume=given.resume)
    except (SelfrouteError, OSError) as error:
        sys.exit(f"selfroute: {error}")


def dry_run(config: TRLConfig, out: Path) -> None:
    """Print the resolved config, in the first process, once TRL has accepted its settings.

    Raises:
        ConfigError: settings that do not fit.
    """
    resolved = whole(config)
    assert isinstance(resolved, TRLConfig)
    grpo_config(resolved, out, int(os.environ.get("WORLD_SIZE", "1")))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(resolved.model_dump(mode="json"), indent=2))


def train(config: TRLConfig, out: Path, *, resume: bool = False) -> Path:
    """Train through TRL; returns the last checkpoint, from which `selfroute evaluate` and `calibrate` go on.

    Raises:
        ConfigError, RunError: settings or a folder that do not fit.
        DivergenceError: the loss was not finite.
    """
    written_out = whole(config)
    assert isinstance(written_out, TRLConfig)
    config = written_out
    first = os.environ.get("RANK", "0") == "0"
    with lock_run(out) if first else nullcontext():
        if first:
            settings = config.model_dump(mode="json")
            ours = {key: value for key, value in settings.items() if key != "trl"}
            task = make_task(pinned(config.task, known_data(out)))
            data = provenance(task, "train", "calibration", "test")
            check_questions(config.cloud, task.load("train"))
            free = free_settings(config.cloud, config.task)
            open_run(out, "train", ours, resume=resume, free=free, as_now=as_now, data=data)
        trainer = GAPGTrainer(config.model_copy(update={"task": pinned(config.task, known_data(out))}), out)
        with trainer.clouds:
            last = get_last_checkpoint(str(out)) if resume else None
            trainer.train(resume_from_checkpoint=last)
        final = out / "checkpoints" / f"step-{config.steps:06d}"
        trainer.save_model(str(final))
        if first:
            # Whole now, for those who evaluate it.
            write_json(final / "state.json", {"step": config.steps})
    trainer.ranks.end()
    return final


if __name__ == "__main__":
    main()
