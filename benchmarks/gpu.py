"""Sampling and the update on a GPU, against what its memory and its arithmetic allow.

    python benchmarks/gpu.py --out FILE

The model has the shape of Qwen2.5-1.5B and random weights, in bfloat16: 28 layers of 1,536, 12 heads on 2 key-value
heads, MLPs of 8,960, a vocabulary of 151,936, tied. The work is a step's: 32 problems of 8 responses, prompts of 256
tokens and responses of 720, all of which are trained. Random weights end a response hardly ever and here never, so the
lengths are forced. Sampling runs with captured graphs and with a growing cache, then the update, in turn, round after
round; the first round warms up and is not counted.

`share_of_bandwidth` is the time that the memory needs at the least, over the time that sampling took, prompts included
(see `decoding_bytes`). `model_flops_utilisation` is the update's arithmetic over what the GPU could have done in its
time (see `update_flops`), the optimizer's step included. Bandwidth and peak go by the GPU's name, as vendors state
them (arithmetic in bfloat16, without sparsity); `--bandwidth` and `--peak` replace them.

FILE gets, where a spread is `{"median", "min", "max"}` over the rounds:

    {"device": name, "torch": version, "transformers": version, "work": {what was run},
     "limits": {"bandwidth_tb_s", "peak_tflop_s"},
     "sampling": {"graphs" and "growing": {"seconds", "tokens_per_s", "share_of_bandwidth": spreads, "peak_gb"}},
     "speedup_by_graphs": spread,
     "update": {"seconds", "tokens_per_s", "model_flops_utilisation": spreads, "peak_gb"}}

`peak_gb` is the most that was allocated on the GPU in any round, in 1e9 bytes; null on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step import spread

if TYPE_CHECKING:
    from transformers import Qwen2Config

    from selfroute.device.hf import HFEngine

LIMITS = {
    "B200": (8.0, 2250),
    "H200": (4.8, 989),
    "H100 NVL": (3.9, 835),
    "H100 PCIe": (2.0, 756),
    "H100": (3.35, 989),
    "A100-SXM4-80GB": (2.04, 312),
    "A100 80GB": (1.94, 312),
    "A100": (1.56, 312),
    "L40S": (0.864, 362),
    "L4": (0.3, 121),
    "4090": (1.01, 165),
    "3090": (0.936, 71),
}
"""TB/s and TFLOP/s in bfloat16 by a part of the GPU's name; the first that fits counts."""


@dataclass(frozen=True)
class Work:
    """What is run."""

    problems: int = 32
    responses: int = 8
    prompt_tokens: int = 256
    max_tokens: int = 720
    micro_batch_tokens: int = 4096
    dtype: str = "bfloat16"
    vocabulary: int = 151_936
    width: int = 1536
    inner: int = 8960
    layers: int = 28
    heads: int = 12
    kv_heads: int = 2

    @property
    def rows(self) -> int:
        return self.problems * self.responses

    @property
    def config(self) -> Qwen2Config:
        from transformers import Qwen2Config

        return Qwen2Config(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip

    @property
    def layer_weights(self) -> int:
        """Weights that every token is multiplied with, but for the output layer."""
        head = self.width // self.heads
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_heads * head
        return self.layers * (attention + 3 * self.width * self.inner)


TINY = Work(
    problems=3, responses=4, prompt_tokens=20, max_tokens=24, micro_batch_tokens=128, dtype="float32", vocabulary=512,
    width=64, inner=96, layers=2, heads=4, kv_heads=2,
)  # fmt: skip


def decoding_bytes(work: Work, width: int) -> int:
    """What sampling reads at the least: sum_t (W + B F_t) bytes over the responses' tokens t.

    W is the weights, read once a token for all rows together; F_t the keys and values of a row, prompt + t positions
    in, which each of the B rows reads of its own.

    Args:
        work: the sizes.
        width: bytes of a number.
    """
    weights = work.layer_weights + work.vocabulary * work.width
    position = 2 * work.layers * work.kv_heads * work.width // work.heads
    filled = sum(work.prompt_tokens + t for t in range(work.max_tokens))
    return width * (work.max_tokens * weights + work.rows * position * filled)


def update_flops(work: Work) -> int:
    """The update's arithmetic: 6 N + 12 L D C a token, forward and backward.

    N is the weights a token is multiplied with, L layers of D = heads * head size, C the positions attended to, on
    average. Prompts run once a problem, and only their last layers' states leave: N lacks the output layer there.
    Nothing that is computed again counts.
    """
    head = work.vocabulary * work.width
    attention = 12 * work.layers * work.width
    prompts = work.problems * work.prompt_tokens
    responses = work.rows * work.max_tokens
    return int(
        prompts * (6 * work.layer_weights + attention * (work.prompt_tokens + 1) / 2)
        + responses * (6 * (work.layer_weights + head) + attention * (work.prompt_tokens + (work.max_tokens + 1) / 2))
    )


def make_engine(work: Work, device: str) -> HFEngine:
    """A random model; the tokenizer is a shipped model's, which only names where decisions are."""
    import torch
    from transformers import AutoModelForCausalLM

    from selfroute.device.base import DeviceConfig
    from selfroute.device.hf import HFEngine

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(work.config, dtype=getattr(torch, work.dtype)).eval()
    engine = HFEngine(model, HFEngine.load(DeviceConfig(device="cpu")).tokenizer)
    # No token ends a response.
    engine.end_tokens = frozenset({work.vocabulary})
    return engine


def sides(engine: HFEngine, work: Work) -> dict[str, Callable[[], None]]:
    """Sampling in both ways, and the update."""
    import torch

    from selfroute.device.base import Sampling
    from selfroute.device.decode import GrowingSteps
    from selfroute.device.graphs import StaticSteps
    from selfroute.device.head import Head
    from selfroute.train.config import TrainConfig
    from selfroute.train.optimizer import MasterAdamW
    from selfroute.train.rows import Row, accumulate_gradients

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(work.vocabulary, (work.problems, work.prompt_tokens), generator=generator).tolist()
    drawn = torch.randint(work.vocabulary, (work.rows, work.max_tokens), generator=generator).tolist()
    rows = [Row(n // work.responses, ids, (-1.0) ** n) for n, ids in enumerate(drawn)]
    streams = [[f"{p}/{g}" for g in range(work.responses)] for p in range(work.problems)]
    sampling = Sampling(max_tokens=work.max_tokens, batch_size=work.rows)
    config = TrainConfig(micro_batch_tokens=work.micro_batch_tokens)
    head = Head(engine.model)
    optimizer = MasterAdamW(engine.model.parameters(), lr=1e-6, fused=engine.model.device.type == "cuda")

    def sample(steps: Any) -> None:
        engine.steps = steps
        groups = engine.generate(prompts, streams, sampling)
        assert all(len(r.token_ids) == work.max_tokens for group in groups for r in group)

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        accumulate_gradients(engine, head, prompts, rows, config, work.rows)
        optimizer.step()

    return {"graphs": lambda: sample(StaticSteps), "growing": lambda: sample(GrowingSteps), "update": update}


def measure(work: Work, device: str, repeats: int) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Seconds of each side, round after round, and the most memory it took, in GB."""
    import torch

    on_gpu = device == "cuda"
    made = sides(make_engine(work, device), work)
    seconds: dict[str, list[float]] = {side: [] for side in made}
    peaks: dict[str, float | None] = dict.fromkeys(made)
    for turn in range(repeats + 1):
        for side, run in made.items():
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
                peaks[side] = max(peaks[side] or 0.0, torch.cuda.max_memory_allocated() / 1e9)
            took = time.perf_counter() - began
            if turn:
                seconds[side].append(took)
            print(f"{turn}/{repeats} {side:8} {took:8.2f} s", flush=True)
    return seconds, peaks


def summary(
    work: Work, seconds: dict[str, list[float]], peaks: dict[str, float | None], bandwidth: float, peak: float
) -> dict[str, Any]:
    """What FILE says of the times.

    Args:
        work: what was run.
        seconds: of each side and round.
        peaks: memory of each side, in GB.
        bandwidth: TB/s.
        peak: TFLOP/s.
    """
    import torch

    width = torch.finfo(getattr(torch, work.dtype)).bits // 8
    least_s, least_update_s = decoding_bytes(work, width) / bandwidth / 1e12, update_flops(work) / peak / 1e12
    tokens = work.rows * work.max_tokens
    sampling = {
        side: {
            "seconds": spread(seconds[side]),
            "tokens_per_s": spread([tokens / s for s in seconds[side]]),
            "share_of_bandwidth": spread([least_s / s for s in seconds[side]]),
            "peak_gb": peaks[side],
        }
        for side in ("graphs", "growing")
    }
    pairs = zip(seconds["growing"], seconds["graphs"], strict=True)
    return {
        "sampling": sampling,
        "speedup_by_graphs": spread([growing / graphs for growing, graphs in pairs]),
        "update": {
            "seconds": spread(seconds["update"]),
            "tokens_per_s": spread([tokens / s for s in seconds["update"]]),
            "model_flops_utilisation": spread([least_update_s / s for s in seconds["update"]]),
            "peak_gb": peaks["update"],
        },
    }


def table(result: dict[str, Any]) -> str:
    """The same, as Markdown; the medians with their spread."""

    def cell(values: dict[str, float], digits: int, scale: float = 1) -> str:
        low, middle, high = (f"{scale * values[key]:.{digits}f}" for key in ("min", "median", "max"))
        return f"{middle} [{low}, {high}]"

    shares = ("share_of_bandwidth", "model_flops_utilisation")
    lines = ["| | seconds | tokens a second | % of the limit | peak GB |", "|---|---|---|---|---|"]
    named = {
        "sampling, captured graphs": result["sampling"]["graphs"],
        "sampling, growing cache": result["sampling"]["growing"],
        "update": result["update"],
    }
    for name, side in named.items():
        share = next(side[key] for key in shares if key in side)
        memory = "" if side["peak_gb"] is None else f"{side['peak_gb']:.1f}"
        cells = (cell(side["seconds"], 2), cell(side["tokens_per_s"], 0), cell(share, 1, 100), memory)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def limits(name: str) -> tuple[float | None, float | None]:
    """TB/s and TFLOP/s of a GPU by its name.

    >>> limits("NVIDIA H100 80GB HBM3")
    (3.35, 989)
    """
    return next((found for part, found in LIMITS.items() if part in name), (None, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--bandwidth", type=float, help="of the GPU's memory, in TB/s")
    parser.add_argument("--peak", type=float, help="of the GPU's arithmetic in bfloat16, in TFLOP/s")
    parser.add_argument("--tiny", action="store_true", help="a small model, without a GPU too, to try the script")
    given = parser.parse_args()
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.tiny:
        sys.exit("torch finds no CUDA GPU here: run this where there is one (--tiny tries the script without)")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    known = limits(name)
    bandwidth, peak = given.bandwidth or known[0], given.peak or known[1]
    if bandwidth is None or peak is None:
        sys.exit(f"the limits of {name} are not known here: give --bandwidth (TB/s) and --peak (TFLOP/s)")
    work = TINY if given.tiny else Work()
    seconds, peaks = measure(work, device, given.repeats)
    result = {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "work": asdict(work),
        "limits": {"bandwidth_tb_s": bandwidth, "peak_tflop_s": peak},
        **summary(work, seconds, peaks, bandwidth, peak),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
