"""The warm start: a small Llama learns the form of a search, and nothing about when to ask.

It trains the tokenizer, then the model, on synthetic traces of training problems (never of calibration or test
problems), and writes a model folder like any checkpoint's. Post-training starts from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfroute.config import Choice
from selfroute.device.base import DeviceConfig
from selfroute.device.hf import HFEngine
from selfroute.device.prefix import SharedPrompts, pack
from selfroute.errors import DivergenceError, TrainingError
from selfroute.protocol import INSTRUCTION, DecisionPoint, chat, find_decision
from selfroute.tasks import make_task
from selfroute.tasks.countdown import problem
from selfroute.train.traces import HIT, MISS, TRACES, Trace, TraceConfig
from selfroute.types import Problem


class WarmstartConfig(TraceConfig):
    """One warm start: the traces, the shape of the model, and the optimizer."""

    seed: int = 0
    """Seed of the weights and of the traces."""
    task: Choice = Choice(name="countdown")
    """The problems; only those whose hash falls into the training split are used."""
    start: str | None = None
    """A model to go on from, with its shape and tokenizer: a shipped one or a folder. Without it, from nothing."""
    hidden_size: int = 128
    """Width of the model."""
    num_layers: int = 4
    """Decoder layers."""
    num_heads: int = 4
    """Attention heads."""
    num_kv_heads: int = 2
    """Key-value heads."""
    mlp_size: int = 384
    """Width of the feed-forward layers."""
    steps: int = Field(4000, ge=1)
    """Optimizer steps of the first phase."""
    problems_per_step: int = Field(16, ge=1)
    """Problems in a batch."""
    traces_per_problem: int = Field(4, ge=1)
    """Traces of each problem in a batch."""
    result_weight: float = Field(6.0, gt=0)
    """Weight in the loss of tokens that follow from those before them (a step's result, an attempt's mark); others
    weigh 1."""
    lr: float = Field(2e-3, gt=0)
    """Peak learning rate; 5 % warm-up, then a cosine to zero."""
    settle_steps: int = Field(200, ge=1)
    """Steps of the second phase, which settles the decision: it goes on with the traces, and with the toss's own
    probability in place of its outcomes."""
    settle_weight: float = Field(1000.0, gt=0)
    """Weight of the decision in the second phase's loss, where other tokens weigh 1 or `result_weight`. Its gradient is
    next to nothing where l is right, so the rest of the trace does not suffer."""
    settle_lr: float = Field(3e-4, gt=0)
    """Peak learning rate of the second phase, with the same schedule."""
    micro_batch_tokens: int = Field(2048, ge=1)
    """Padded response tokens in one forward pass; changes speed, memory and rounding only."""
    log_every: int = Field(50, ge=1)
    """Steps between progress lines."""

    @field_validator("task")
    @classmethod
    def _generated(cls, task: Choice) -> Choice:
        if task.settings.get("path") is not None:
            raise ValueError("the warm start makes its own training problems: leave task.path out")
        if task.name not in TRACES:
            raise ValueError(f"there are no traces of it (known: {', '.join(TRACES)})")
        return task


# Qwen2 splits text this way, each digit by itself, and llama.cpp knows the rule as `qwen2`.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen2's pre-tokenizer, in which each digit is a token.

    The tags stay ordinary text of several tokens that share `<`, as in real vocabularies, because the training text
    has their words but not the tags.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    question = problem((1, 2, 3), 6).question
    words = INSTRUCTION.replace("<", " ").replace(">", " ").replace("/", " ") + " " + question
    texts = [words, "system\nuser\nassistant\nanswer\nunknown\n", "?\n!\n", "+(\n-(\n*(\n/(\n"] * 50
    texts += ["a</a"] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=40,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def warmstart(config: WarmstartConfig, out: Path, *, command: str = "", report: Callable[[str], None] = print) -> Path:
    """Train and write a model folder: weights (fp16 safetensors), tokenizer, and `warmstart.json`, its provenance.

    `command` is what made it, for the provenance.

    Raises:
        DivergenceError: the loss is not finite.
        TrainingError: `out` is in use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"{out} is not an empty folder: give another --out")
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    if config.start is None:
        tokenizer = train_tokenizer()
        engine = HFEngine(_model(config, tokenizer), tokenizer)
    else:
        # On the processor, as without `start`: the traces' masks are there.
        engine = HFEngine.load(DeviceConfig(model=config.start, device="cpu"))
    count = sum(p.numel() for p in engine.model.parameters())
    report(f"{count:,} parameters, vocabulary {len(engine.tokenizer):,}")
    _imitate(engine, config, "learn", config.steps, config.lr, report)
    _imitate(engine, config, "settle", config.settle_steps, config.settle_lr, report)
    if config.help_probability_after_hit is None:
        before, after = level(engine, config)
        report(f"level    l after hits less l after misses: {before:+.5f} nats, now {after:+.5f}")
    _save(config, engine, out, command, time.perf_counter() - started)
    return out


def _imitate(
    engine: HFEngine,
    config: WarmstartConfig,
    phase: Literal["learn", "settle"],
    steps: int,
    lr: float,
    report: Callable[[str], None],
) -> None:
    """One phase: learn the traces; or go on with them and settle the decision, whose target is then the toss itself."""
    model, tokenizer = engine.model, engine.tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))),
    )
    rng = random.Random(f"{'warmstart' if phase == 'learn' else phase}-{config.seed}")
    source = make_task(config.task).training_problems(rng)
    started, seen, wrong = time.perf_counter(), 0, 0
    model.train()
    for step in range(1, steps + 1):
        problems = [next(source) for _ in range(config.problems_per_step)]
        prompts = [engine.encode(chat(p.question)) for p in problems]
        owners, rows, traces = _traces(engine, problems, config, rng)
        follows = [determined(row, tokenizer) for row in rows]
        chances = [
            [t.help_chance if phase == "settle" and d else math.nan for d in decides(row, engine)]
            for row, t in zip(rows, traces, strict=True)
        ]
        total = sum(config.result_weight if f else 1.0 for row in follows for f in row)
        loss = 0.0
        optimizer.zero_grad(set_to_none=True)
        shared = SharedPrompts(model, prompts, engine.pad)
        for part in pack(rows, config.micro_batch_tokens):
            logits_BTV, targets_BT, mask_BT = shared.logits([owners[i] for i in part], [rows[i] for i in part])
            logits_NV, targets_N = logits_BTV[mask_BT], targets_BT[mask_BT]
            determined_N = torch.tensor([f for i in part for f in follows[i]])
            chance_N = torch.tensor([c for i in part for c in chances[i]], dtype=torch.float64)
            part_loss = trace_loss(logits_NV, targets_N, determined_N, chance_N, engine.points[0], config) / total
            part_loss.backward()
            loss += part_loss.item()
            seen += int(determined_N.sum())
            wrong += int((determined_N & (logits_NV.argmax(-1) != targets_N)).sum())
        shared.backward()
        if not math.isfinite(loss):
            key = "lr" if phase == "learn" else "settle_lr"
            raise DivergenceError(f"the loss is {loss} at step {step} of {phase}: lower {key} (now {lr:g})")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % config.log_every == 0 or step == steps:
            report(
                f"{phase} {step}/{steps}  loss {loss:.4f}  results and marks wrong {wrong / max(1, seen):.2%}  "
                f"{time.perf_counter() - started:.0f} s"
            )
            seen, wrong = 0, 0
    model.eval()


def _traces(
    engine: HFEngine, problems: Sequence[Problem], config: WarmstartConfig, rng: random.Random
) -> tuple[list[int], list[list[int]], list[Trace]]:
    """Traces of some problems: for each, its problem's place, its tokens with the end token, and the trace."""
    owners, rows, traces = [], [], []
    for number, p in enumerate(problems):
        for _ in range(config.traces_per_problem):
            made = TRACES[config.task.name](p, config, rng)
            owners.append(number)
            rows.append([*engine.tokenizer.encode(made.text, add_special_tokens=False), engine.tokenizer.eos_token_id])
            traces.append(made)
    return owners, rows, traces


def trace_loss(
    logits_NV: Tensor,
    targets_N: Tensor,
    determined_N: Tensor,
    chance_N: Tensor,
    point: DecisionPoint,
    config: WarmstartConfig,
) -> Tensor:
    """The weighted cross-entropy of N tokens, summed, in nats.

    `determined_N` marks those that follow from what stands before them. `chance_N` (float64) is NaN but for the
    decisions whose target is the toss's probability, which it holds, in place of the toss's outcome.
    """
    loss_N = cross_entropy(logits_NV, targets_N, reduction="none")
    settles_N = ~chance_N.isnan()
    log_prob_DV, chance_D = logits_NV[settles_N].log_softmax(-1), chance_N[settles_N]
    asks_D, answers_D = chance_D.to(log_prob_DV), (1 - chance_D).to(log_prob_DV)
    toss_D = asks_D * log_prob_DV[:, point.help] + answers_D * log_prob_DV[:, point.answer]
    loss_N = loss_N.masked_scatter(settles_N, -toss_D)
    weight_N = torch.where(determined_N, config.result_weight, 1.0)
    weight_N[settles_N] = config.settle_weight
    return (loss_N * weight_N).sum()


@torch.no_grad()
def level(engine: HFEngine, config: WarmstartConfig) -> tuple[float, float]:
    """Take out of l what tells hits from misses on average, by turning the two tags' embeddings a little.

    l is linear in the last hidden state, l = (w_help - w_answer) h. With v the mean h after hits less the mean h after
    misses, over traces of training problems, the part of w_help - w_answer along v goes, half from each side. What the
    hidden state knows of success stays, for post-training to use. Traces that all hit, or all miss, leave all as it is.

    Returns:
        (w_help - w_answer) v in nats, before and after.
    """
    model, point = engine.model, engine.points[0]
    rng = random.Random(f"level-{config.seed}")
    source = make_task(config.task).training_problems(rng)
    states: dict[bool, list[Tensor]] = {True: [], False: []}
    for _ in range(_LEVEL_BATCHES):
        problems = [next(source) for _ in range(config.problems_per_step)]
        owners, rows, traces = _traces(engine, problems, config, rng)
        shared = SharedPrompts(model, [engine.encode(chat(p.question)) for p in problems], engine.pad)
        for part in pack(rows, config.micro_batch_tokens):
            hidden_BTH = shared.states([owners[i] for i in part], [rows[i] for i in part])
            for b, i in enumerate(part):
                states[traces[i].hit].append(hidden_BTH[b, decides(rows[i], engine).index(True)])
    if not states[True] or not states[False]:
        return 0.0, 0.0
    v = torch.stack(states[True]).mean(0) - torch.stack(states[False]).mean(0)
    weight = model.get_output_embeddings().weight
    tilt = ((weight[point.help] - weight[point.answer]) @ v).item()
    turn = tilt / (v @ v).item() / 2 * v
    weight[point.help] -= turn
    weight[point.answer] += turn
    return tilt, ((weight[point.help] - weight[point.answer]) @ v).item()


_LEVEL_BATCHES = 50
"""Batches of traces that `level` looks at."""


def determined(row: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[bool]:
    """Which tokens of a trace leave no choice: the digits after each `=`, and the mark after each attempt."""
    found, result = [], False
    for token in tokenizer.convert_ids_to_tokens(list(row)):
        result = token == "=" or (result and token.isdigit())
        found.append(token in (f"{HIT}\u010a", f"{MISS}\u010a") or (result and token.isdigit()))
    return found


def decides(row: Sequence[int], engine: HFEngine) -> list[bool]:
    """Which token of a trace asks or answers."""
    found = find_decision(row, engine.points, engine.tokenizer)
    return [found is not None and n == found[0] for n in range(len(row))]


def _model(config: WarmstartConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.mlp_size,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(shape)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def _save(config: WarmstartConfig, engine: HFEngine, out: Path, command: str, seconds: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    engine.tokenizer.save_pretrained(out)
    engine.model.to(torch.float16).save_pretrained(out)
    weights = (out / "model.safetensors").read_bytes()
    provenance = {
        "command": command,
        "config": config.model_dump(mode="json"),
        "torch": torch.__version__.split("+")[0],
        "threads": torch.get_num_threads(),
        "seconds": round(seconds),
        "sha256": {"model.safetensors": hashlib.sha256(weights).hexdigest()},
    }
    (out / "warmstart.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
