"""A training step, ours against TRL's trainers: time and memory as ratios, both sides in turn in one run.

    python benchmarks/step.py --out FILE

The work is the same on both sides: a random Llama of 31M parameters with a vocabulary of 32,000, 8 problems of 8
responses, prompts of 64 tokens, and responses whose lengths are forced, drawn once from a log-normal (mean 64, cut at
192). With half of the problems kept by the filter ours trains on those alone, and TRL on all: that is the point. The
ratio with all kept is there too. `rollout_time_ratio` is our sampling against `model.generate`.

Each side is a process of its own that holds its model and waits for its turn, so that one run meets the same machine
on all sides; the first round is not counted. Memory is the step's peak of resident memory less what was resident after
loading (Linux). TRL runs with its own defaults but for what makes it the same work: no KL term, no length limit but
192, float32, and no gradient checkpointing, which is off on our side too.

FILE gets `{ratio: {"median", "min", "max"}, ..., "sides": {side: {"seconds", "peak_mb"}}, "work": {...}}`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

PROBLEMS, RESPONSES, PROMPT_TOKENS, MAX_TOKENS = 8, 8, 64, 192
MICRO_BATCH_TOKENS = 2048
"""Of ours: about what eight of TRL's rows hold, prompts and padding included."""
SIDES = ("half_kept", "all_kept", "trl_rloo", "trl_grpo", "rollout", "generate")
RATIOS = {
    "time_ratio_vs_trl_rloo": ("seconds", "half_kept", "trl_rloo"),
    "time_ratio_vs_trl_grpo": ("seconds", "half_kept", "trl_grpo"),
    "time_ratio_all_kept": ("seconds", "all_kept", "trl_rloo"),
    "memory_ratio_vs_trl_rloo": ("peak_mb", "half_kept", "trl_rloo"),
    "memory_ratio_vs_trl_grpo": ("peak_mb", "half_kept", "trl_grpo"),
    "rollout_time_ratio": ("seconds", "rollout", "generate"),
}


def lengths() -> list[int]:
    """The length of each response, in tokens, the same on all sides."""
    sigma = 0.6
    drawn = np.random.default_rng(0).lognormal(np.log(64) - sigma**2 / 2, sigma, PROBLEMS * RESPONSES)
    return [int(n) for n in drawn.clip(4, MAX_TOKENS)]


def make_model(folder: Path, *, tiny: bool) -> None:
    """A random Llama and a byte-level BPE tokenizer that makes its merges from the bytes' order."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = 2_000 if tiny else 32_000
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<end>", *letters]
    merges = [(a, b) for a in letters for b in letters][: vocabulary - len(tokens)]
    tokens += [a + b for a, b in merges]
    tokenizer = Tokenizer(BPE({token: n for n, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    width = 64 if tiny else 512
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=5,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=512,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def questions(folder: Path) -> list[str]:
    """Texts of exactly 64 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng, found = np.random.default_rng(1), []
    while len(found) < PROBLEMS:
        text = "".join(rng.choice(list("abcdefghij "), 3 * PROMPT_TOKENS))
        while len(tokenizer.encode(text)) > PROMPT_TOKENS:
            text = text[:-1]
        if len(tokenizer.encode(text)) == PROMPT_TOKENS:
            found.append(text)
    return found


def ours(folder: Path, *, kept: int) -> Callable[[], None]:
    """A step of our loop, from the pieces that `Trainer.step` calls, with `kept` of the problems solved by one of their
    responses and the others by none."""
    from selfroute.device.base import DeviceConfig, Sampling
    from selfroute.train.config import TrainConfig
    from selfroute.train.loop import Trainer
    from selfroute.train.plan import Judged
    from selfroute.train.ranks import Ranks
    from selfroute.train.reward import RewardConfig
    from selfroute.types import Answer, Problem

    config = TrainConfig(
        device=DeviceConfig(model=str(folder), device="cpu"),
        reward=RewardConfig(answer=1.0, cloud=0.0, format=0.0),
        sampling=Sampling(max_tokens=MAX_TOKENS),
        decision_weight=0.0,
        lr=1e-6,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        problems_per_step=PROBLEMS,
        num_responses=RESPONSES,
    )
    trainer = Trainer(config, Path(tempfile.mkdtemp()), Ranks())
    sample, prompts = _sampler(trainer.engine, folder)
    problems = [Problem(str(p), "", {}) for p in range(PROBLEMS)]
    step = 0

    def run() -> None:
        nonlocal step
        step += 1
        groups = sample(step)
        decisions = [Answer("", well_formed=True)] * RESPONSES
        solved = [[g == 0 and p < kept for g in range(RESPONSES)] for p in range(PROBLEMS)]
        judged = [Judged(group, decisions, correct, [float(c) for c in correct])
                  for group, correct in zip(groups, solved, strict=True)]  # fmt: skip
        plan = trainer.planner.plan(step, problems, judged)
        assert len(plan.selection.kept) == kept
        rows = trainer.planner.rows(plan)
        assert len(rows) == kept * RESPONSES
        trainer._update(step, [prompts[p] for p in plan.selection.kept], rows, plan.count)

    return run


def _sampler(engine: Any, folder: Path) -> tuple[Callable[[int], Any], list[list[int]]]:
    from selfroute.device.base import Sampling

    # None but the forced length ends a response.
    engine.end_tokens = frozenset({len(engine.tokenizer)})
    prompts = [engine.tokenizer.encode(text) for text in questions(folder)]
    limits = np.array(lengths()).reshape(PROBLEMS, RESPONSES).tolist()

    def sample(step: int) -> Any:
        streams = [[f"{step}/{p}/{g}" for g in range(RESPONSES)] for p in range(PROBLEMS)]
        groups = engine.generate(prompts, streams, Sampling(max_tokens=MAX_TOKENS), limits=limits)
        assert [[len(r.token_ids) for r in group] for group in groups] == limits
        return groups

    return sample, prompts


def rollout(folder: Path) -> Callable[[], None]:
    """Our sampling alone."""
    from selfroute.device.base import DeviceConfig
    from selfroute.device.hf import HFEngine

    sample, _ = _sampler(HFEngine.load(DeviceConfig(model=str(folder), device="cpu")), folder)

    def run() -> None:
        sample(1)

    return run


def forced_model(folder: Path) -> Any:
    """transformers' Llama, whose `generate` ends each response at its length."""
    import torch
    from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

    wanted = torch.tensor(lengths())

    class Force(LogitsProcessor):
        def __init__(self) -> None:
            self.made = 0

        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            self.made += 1
            scores[:, 1] = -torch.inf
            ending = wanted == self.made
            scores[ending] = -torch.inf
            scores[ending, 1] = 0.0
            return scores

    class Forced(LlamaForCausalLM):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            made = super().generate(*args, logits_processor=LogitsProcessorList([Force()]), **kwargs)
            assert made.shape[1] - PROMPT_TOKENS == max(lengths())
            return made

    return Forced.from_pretrained(folder)


def generate(folder: Path) -> Callable[[], None]:
    """`model.generate` alone."""
    import torch
    from transformers import AutoTokenizer

    model, tokenizer = forced_model(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompts = torch.tensor([tokenizer.encode(text) for text in questions(folder) for _ in range(RESPONSES)])

    def run() -> None:
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, top_p=1.0,
            max_new_tokens=MAX_TOKENS,
        )  # fmt: skip

    return run


def trl(folder: Path, side: str, turn: Callable[[], bool], done: Callable[[], None]) -> None:
    """TRL's own training loop; a step waits for its turn, and says when it is done."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    if side == "trl_grpo":
        from trl import GRPOConfig as Config
        from trl import GRPOTrainer as Trainer
    else:
        from trl import RLOOConfig as Config
        from trl import RLOOTrainer as Trainer

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not turn():
                sys.exit()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done()

    def reward(completions: Sequence[str], **columns: Any) -> list[float]:
        return [float(n % RESPONSES == 0) for n in range(len(completions))]

    settings = Config(
        output_dir=tempfile.mkdtemp(), max_steps=1_000, per_device_train_batch_size=RESPONSES,
        gradient_accumulation_steps=PROBLEMS, num_generations=RESPONSES, max_completion_length=MAX_TOKENS,
        learning_rate=1e-6, beta=0.0, bf16=False, use_cpu=True, gradient_checkpointing=False,
        shuffle_dataset=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(
        forced_model(folder),
        reward,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": text} for text in questions(folder)]),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        callbacks=[Turns()],
    ).train()


def resident_mb(field: str) -> float:
    """VmRSS or VmHWM, its peak, of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def work(side: str, folder: Path) -> None:
    """A worker: after loading and after each step it writes a line; it takes a step for each line that it reads."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    loaded = began = 0.0

    def turn() -> bool:
        nonlocal loaded, began
        if not loaded:
            loaded = resident_mb("VmRSS")
            print("ready", file=out)
        if not sys.stdin.readline():
            return False
        # The peak begins anew.
        Path("/proc/self/clear_refs").write_text("5")
        began = time.perf_counter()
        return True

    def done() -> None:
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "peak_mb": resident_mb("VmHWM") - loaded}), file=out)

    if side.startswith("trl"):
        trl(folder, side, turn, done)
        return
    made = {
        "half_kept": lambda: ours(folder, kept=PROBLEMS // 2),
        "all_kept": lambda: ours(folder, kept=PROBLEMS),
        "rollout": lambda: rollout(folder),
        "generate": lambda: generate(folder),
    }
    step = made[side]()
    while turn():
        step()
        done()


def measure(folder: Path, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Each side's steps, in turn, round after round; the first round warms up."""
    processes = {
        side: subprocess.Popen(  # noqa: S603
            [sys.executable, __file__, "--worker", side, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )
        for side in SIDES
    }  # fmt: skip

    def line(side: str) -> str:
        read = processes[side].stdout.readline()  # type: ignore[union-attr]
        if not read:
            sys.exit(f"{side} ended early (its error is above)")
        return read

    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    try:
        for side in SIDES:
            line(side)
        for turn in range(repeats + 1):
            for side, process in processes.items():
                process.stdin.write("\n")  # type: ignore[union-attr]
                step = json.loads(line(side))
                if turn:
                    found[side].append(step)
                print(f"{turn}/{repeats} {side:18} {step['seconds']:7.2f} s {step['peak_mb']:8.0f} MB", flush=True)
    finally:
        for process in processes.values():
            process.kill()
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script; its ratios mean nothing")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker[0], Path(given.worker[1]))
        return
    if given.out is None:
        parser.error("--out is needed")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), tiny=given.tiny)
        found = measure(Path(folder), given.repeats)
    result: dict[str, Any] = {}
    for name, (what, one, other) in RATIOS.items():
        result[name] = spread([a[what] / b[what] for a, b in zip(found[one], found[other], strict=True)])
        print(f"{name:36}" + "".join(f"  {key} {value:.3f}" for key, value in result[name].items()))
    result["sides"] = {
        side: {what: spread([step[what] for step in steps]) for what in ("seconds", "peak_mb")}
        for side, steps in found.items()
    }
    result["work"] = {
        "problems": PROBLEMS,
        "responses": RESPONSES,
        "tokens": sum(lengths()),
        "cores": len(os.sched_getaffinity(0)),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
